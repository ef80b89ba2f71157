"""GPTQ: columns are rounded one after another, and what is left of each error is put into the columns to come.

    H = 2 / samples * sum of x x^T over the inputs of the layer (+ damping),  U = upper Cholesky factor of its inverse
    q_j = round(w_j),  e = (w_j - q_j) / U[j, j],  w_k -= e U[j, k] for all k > j

Act-order takes columns by falling H[j, j]; groups then are of columns in that order, or with static groups of the
columns as they lie, with scales fixed beforehand. Otherwise the scale of a group is the min/max of its columns as they
stood when the block of 128 columns began in which the group begins: with the errors of all blocks before in them, which
widens the ranges of the last groups, but not those of columns of the same block. Inputs that are always zero count as
H[j, j] = 1, and their weights as 0 except in the range of whole rows. Static groups are the default, since in 3 bits
they are far better (docs/quantizers.md).

Source: Frantar et al. 2023, algorithm 1; blocks, act-order, static groups and unused inputs as in the released code
(GPTQ's, AutoGPTQ's and QuaRot's agree), whose own defaults the presets keep. One thing differs: scales are rounded to
fp16, in which checkpoints hold them, before columns are rounded with them, so that this rounding is compensated too.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from intactkv_eval.cell.spec import SymmetricFormula
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.model.matrices import finite_matrix, set_matrix
from intactkv_eval.quantize.method import Block, check_settings
from intactkv_eval.quantize.rtn import group_range, quantize_in_range
from intactkv_eval.quantize.shrink import shrunk_range
from intactkv_eval.quantize.trial import run_noting
from intactkv_eval.weights.quantized import QuantizedWeight, check_group_size

logger = logging.getLogger(__name__)

COLUMNS = 128  # of a block: errors inside of it reach later blocks, and the ranges of groups, only at its end
_DAMPS = (1, 10, 100)  # times the damping that was asked, where the matrix is not positive definite


@dataclass(frozen=True)
class GPTQ:
    """The method on blocks. sequential: within a block, too, layers see the inputs that quantized ones make.

    damp: of the mean of H's diagonal. shrink: each group's range is searched for the least error (shrink.py).
    """

    bits: int
    group_size: int
    symmetric: SymmetricFormula | None = None
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.05
    sequential: bool = True
    shrink: bool = False
    wants_full_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        if not 0 < self.damp < 1:
            raise ConfigError(f"GPTQ: damp={self.damp}; use a share of the diagonal's mean between 0 and 1")

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """Every layer of the block. Raises CheckpointError where a layer's inputs are not finite."""
        found: dict[str, QuantizedWeight] = {}
        groups = input_groups(block)
        for together in [[names] for names in groups] if self.sequential else [groups]:
            for names, hessian in zip(together, hessians(block, together), strict=True):
                found |= self._layers(block, names, hessian)
        return {name: found[name] for name in block.layers}

    def _layers(self, block: Block, names: list[str], hessian: Tensor) -> dict[str, QuantizedWeight]:
        if not torch.isfinite(hessian).all():
            raise CheckpointError(f"{block.name}.{names[0]}: its inputs on the calibration samples are not finite")
        found = {}
        for name in names:
            layer = block.layers[name]
            full = f"{block.name}.{name}"
            found[name] = gptq(finite_matrix(layer, full), hessian, self, full)
            set_matrix(layer, found[name])
        return found


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    options: GPTQ,
    name: str = "the layer",
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Quantize `weight` [O, I] for inputs whose outer products sum to `hessian` [I, I] (fp32, see `hessians`).

    scale_dtype: that of the scales that columns are rounded with; the released code has fp32.
    """
    size = check_group_size(weight.shape[1], options.group_size, name)
    find = partial(_in_range, options=options, size=size, name=name, scale_dtype=scale_dtype)
    matrix, unused = weight.float().clone(), torch.diagonal(hessian) == 0
    whole = find(matrix) if options.group_size == -1 else None  # the released code reads whole rows first
    matrix[:, unused] = 0
    hessian = hessian + torch.diag(unused.to(hessian.dtype))
    # stable: of equal columns the order, and so the bytes, must not depend on the sort
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True) if options.act_order else None
    static = options.static_groups or size == weight.shape[1]
    fixed = whole or (find(matrix) if static else None)
    place = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    if order is not None:
        matrix, hessian = matrix[:, order], hessian[order][:, order]
    rounding = _Rounding(2**options.bits - 1, size, place, fixed, find)
    codes = _columns(matrix, inverse_root(hessian, options.damp, name), rounding)
    if order is not None and static:
        codes, order = codes[:, torch.argsort(order)], None
    scales, zeros = rounding.parameters()
    return QuantizedWeight.from_codes(
        codes, scales, zeros, options.bits, size, None if order is None else order.to(torch.int32)
    )


def _in_range(weight: Tensor, options: GPTQ, size: int, name: str, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Rounded to nearest: its scales and zeros are those that GPTQ rounds with."""
    find = shrunk_range(weight, options.bits, size, options.symmetric, scale_dtype) if options.shrink else None
    low, high = find or group_range(weight, size)
    return quantize_in_range(weight, (low, high), options.bits, size, scale_dtype, options.symmetric, name)


def _columns(matrix: Tensor, root: Tensor, rounding: "_Rounding") -> Tensor:
    """Codes [O, I] of `matrix` [O, I], which is used up; block by block."""
    inputs = matrix.shape[1]
    rows, codes = matrix.t().contiguous(), torch.empty(inputs, matrix.shape[0], dtype=torch.uint8, device=matrix.device)
    for start in range(0, inputs, COLUMNS):
        stop = min(start + COLUMNS, inputs)
        rounding.begin(rows, start, stop)
        part, errors = rows[start:stop], torch.empty_like(rows[start:stop])
        for j in range(stop - start):
            codes[start + j], rounded = rounding.column(part[j], start + j)
            errors[j] = (part[j] - rounded) / root[start + j, start + j]
            part[j + 1 :].addr_(root[start + j, start + j + 1 : stop], errors[j], alpha=-1)
        rows[stop:] -= root[start:stop, stop:].t() @ errors
    return codes.t().contiguous()


class _Rounding:
    """Scale and zero of each column. top: the largest code. size: columns of a group. place: where each column lies in
    the layer. fixed: scales and zeros of all groups, known beforehand; where it is None, `find` makes each group's.
    """

    def __init__(
        self,
        top: int,
        size: int,
        place: Tensor,
        fixed: QuantizedWeight | None,
        find: Callable[[Tensor], QuantizedWeight],
    ) -> None:
        self.top, self.size, self.fixed, self._find = top, size, fixed, find
        self._group = (place // size).tolist()
        self._scales = list(fixed.scales.t()) if fixed is not None else []
        self._zeros = list(fixed.zeros.t()) if fixed is not None else []

    def begin(self, rows: Tensor, start: int, stop: int) -> None:
        """Read the ranges of the groups that begin in the block of columns start to stop, from `rows` [I, O] as they
        stand before its first column is rounded."""
        first = -(-start // self.size) * self.size
        for column in range(first, stop, self.size) if self.fixed is None else ():
            made = self._find(rows[column : column + self.size].t())
            self._scales.append(made.scales[:, 0])
            self._zeros.append(made.zeros[:, 0])

    def column(self, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes [O], and the numbers that they stand for."""
        group = self._group[index] if self.fixed is not None else index // self.size
        scale, zero = self._scales[group].float(), self._zeros[group].float()
        codes = (torch.round(values / scale) + zero).clamp_(0, self.top)
        return codes.to(torch.uint8), (codes - zero) * scale

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros [O, G]."""
        return torch.stack(self._scales, dim=1), torch.stack(self._zeros, dim=1)


def inverse_root(hessian: Tensor, damp: float, name: str) -> Tensor:
    """The upper Cholesky factor of the inverse of `hessian` [I, I], damped.

    Raises CheckpointError where it is not positive definite even with 100 times the damping.
    """
    mean = torch.diagonal(hessian).mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    for factor in _DAMPS:
        share = min(damp * factor, 1.0)
        lower, info = torch.linalg.cholesky_ex(hessian + share * mean * torch.eye(len(hessian), device=hessian.device))
        if not int(info):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(info) and torch.isfinite(upper).all():
            if factor > 1:
                logger.warning("%s: GPTQ needed damping %g, not %g", name, share, damp)
            found: Tensor = upper
            return found
    raise CheckpointError(
        f"{name}: GPTQ's matrix is not positive definite with {_DAMPS[-1]} times damp={damp}; use more samples or a "
        "larger --damp"
    )


def input_groups(block: Block) -> list[list[str]]:
    """The layers that get the same tensor, together, in the order in which the block calls them."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for tensor, names in seen:
            if tensor is x:
                names.append(name)
                return
        seen.append((x, [name]))

    run_noting(block, 0, list(block.layers), note)
    missing = [name for name in block.layers if not any(name in names for _, names in seen)]
    if missing:
        raise ConfigError(f"{block.name}: {missing[0]} is not used on the calibration samples, so GPTQ cannot place it")
    return [names for _, names in seen]


def hessians(block: Block, groups: Sequence[list[str]]) -> list[Tensor]:
    """2 / samples times the sum of outer products [I, I] (fp32) of each group's inputs over all samples.

    The factor is the released code's. It matters only where an input is always zero and counts as 1.
    """
    sums: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        stage = getattr(block.layers[name], "prepare", None)  # of a rotated model: what its product is given
        x = x if stage is None else stage(x)
        rows = x.reshape(-1, x.shape[-1]).float()
        sums[name] = sums[name].addmm_(rows.t(), rows) if name in sums else rows.t() @ rows

    for sample in range(len(block.inputs)):
        run_noting(block, sample, [names[0] for names in groups], note)
    return [sums[names[0]] * (2 / len(block.inputs)) for names in groups]
