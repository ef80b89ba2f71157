"""Whether one model's weights are another's, quantized or not: sample against sample (weight_sample.py).

What neither model has quantized (norms, biases, embeddings, layers that were left out) is the same number for number,
up to the rounding of the dtypes that the two were stored in. A quantized matrix Q of a matrix W keeps W's direction,
and, within 16 numbers that share a scale, is no farther from W than the distance between neighbouring values of Q:

    cosine = Q.W / |Q||W|                     steps = rms(Q - W) / rms(half the gap to the next value of Q)
    residual = |Q - W| / |Q|                  swapped = the share of numbers whose order in Q contradicts that in W

A quantizer that rounds to nearest swaps none, which tells a copy of a model that was trained for a while from a copy
of this one, where it rounds more coarsely than the training changed the weights. One that may fold factors into the
weights (AWQ) is compared behind the best factors by row and column. The bounds are measured, on a real model and on
random ones (tests/pivot/test_same_weights.py).
Pure functions of numbers: knows no model, no format and no file.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.weight_sample import INPUT, OUTPUT, Sampled

_GROUP = 16  # numbers of a row that share a scale in every format that groups along rows
_LEAST = {2: 0.3, 3: 0.6, 4: 0.85, 8: 0.99}
_LEAST_FITTED = {2: 0.55, 3: 0.7, 4: 0.85, 8: 0.99}
_MOST_STEPS = 1.1
_MOST_FINE = 0.1  # the residual of a matrix that takes nearly as many values as the full-precision one: 8 bits
_MOST_SWAPPED = 1 / 500
_FINE = 0.9
_ULP = 2**-7  # of bfloat16, the coarsest dtype that weights are stored in
_TINY = 2**-23  # what fp16 cannot hold, and what Gemma's 1 + weight loses in fp32
_ROUNDINGS = ((), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16))
_PASSES = 10
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


Nearest: TypeAlias = Literal["all", "fine"] | None


class Rules(NamedTuple):
    """What the writer of the evaluated checkpoint may have done to the weights, beside rounding matrices of its layers.

    scaled: folded factors into norms, rows and columns of the decoder layers (AWQ, OmniQuant).
    grouped: neighbours in a row share a scale, unless it is a group's edge. bits: of all quantized matrices, if known.
    nearest: which matrices are certainly rounded number by number to the nearest value (bitsandbytes, FP8): all, or
    those that take many values. None where errors may be spread over other numbers, as GPTQ does.
    dequantized: matrices that lie there as plain numbers may have been rounded. words: embeddings too.
    """

    scaled: bool = False
    grouped: bool = True
    bits: int | None = None
    nearest: Nearest = None
    dequantized: bool = False
    words: bool = False


def check_same(
    found: Mapping[str, Sampled], expected: Mapping[str, Tensor], rules: Rules, checkpoint: str, reference: str
) -> float | None:
    """The largest residual of a quantized matrix, None where no matrix is quantized.

    Raises PivotError, with the tensor and the figure, where the sample of the checkpoint is not one of the reference's.
    """
    fault = _of_names(found, expected)
    worst: float | None = None
    # A layer with an adapter is its base layer and the adapter: where both models show these, the sum says no more.
    sums = {name.replace(".base_layer.", ".") for name in found.keys() & expected.keys() if ".base_layer." in name}
    for name, sampled in found.items():
        if fault is None and name in expected and name not in sums:
            fault, residual = _of_tensor(name, sampled, expected[name], rules)
            worst = residual if worst is None else max(worst, residual or 0.0)
    if fault is not None:
        raise PivotError(
            f"{checkpoint} is not made from {reference}: {fault}. Name the full-precision model that was quantized "
            "with reference=..., in its own revision and not a fine-tuned one"
        )
    return worst


def _of_names(found: Mapping[str, Sampled], expected: Mapping[str, Tensor]) -> str | None:
    """A vector of weights (a norm's) that the one model has and the other has not; or no matrix that both have."""
    own = {name for name, one in found.items() if one.plain and one.numbers.ndim == 1 and name.endswith(".weight")}
    theirs = {name for name, one in expected.items() if one.ndim == 1 and name.endswith(".weight")}
    if own - expected.keys():
        return f"the latter holds no tensor {min(own - expected.keys())}: it is not of this architecture"
    if theirs - found.keys():
        return f"the former holds no tensor {min(theirs - found.keys())}: it is not of this architecture"
    if not any(one.numbers.ndim == 2 and name in expected for name, one in found.items()):
        return "they have no matrix of the same name: they are not of one architecture"
    return None


def _of_tensor(name: str, sampled: Sampled, expected: Tensor, rules: Rules) -> tuple[str | None, float | None]:
    """What tells that a tensor is not the reference's, or None; and the residual, where it was quantized."""
    words = name.startswith((f"{INPUT}.", f"{OUTPUT}."))
    rows = min(len(sampled.numbers), len(expected)) if words else None  # a vocabulary that was padded
    numbers, other = sampled.numbers[:rows], expected[:rows]
    if numbers.shape != other.shape:
        return f"{name} has {tuple(numbers.shape)} numbers in the sample, and {tuple(other.shape)} are expected", None
    unequal = difference(numbers, other)
    scaled = rules.scaled and _IN_A_LAYER.search(name) is not None
    rounded = rules.words if name.startswith(f"{INPUT}.") else rules.dequantized
    if unequal is None or (numbers.ndim == 1 and scaled and bool(torch.isfinite(numbers).all())):
        return None, None
    if numbers.ndim == 1 or (sampled.plain and not scaled and not rounded):
        return f"{name}, which neither quantizes, {unequal}", None
    fault, residual = _of_matrix(numbers.double(), other.double(), rules, scaled)
    return (None if fault is None else f"{name} {fault}"), residual


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How the one's numbers are not the other's, or None where they are but for the dtypes that they were stored in.

    In 16 bits a sixteenth of the numbers may be off by the last digit: they were rounded twice, to fp16 and bf16.
    """
    one, other = found.float(), expected.float()
    off = [~_equal(_through(one, chain), _through(other, chain)) for chain in _ROUNDINGS]
    least = min(off, key=lambda places: int(places.sum()))
    share, count = float(least.float().mean()), least.numel()
    away = (one - other).abs() / other.abs().clamp(min=_TINY)
    allowed = 1 / 16 + 6 * (1 / 16 / count) ** 0.5 if found.dtype != torch.float32 else 0.0
    if share == 0 or (share <= allowed and bool((away[least] <= _ULP).all())):
        return None
    size = float((one - other).norm() / other.norm().clamp(min=_TINY))
    return (
        f"differs from the reference's by {size:.2g} of its size, in {share:.1%} of the sampled numbers (expected: the "
        "same, but for rounding to 16 bits)"
    )


def _through(numbers: Tensor, chain: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in chain:
        numbers = numbers.to(dtype).float()
    return numbers


def _equal(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | ((one - other).abs() <= _TINY)


def _of_matrix(q: Tensor, w: Tensor, rules: Rules, scaled: bool) -> tuple[str | None, float]:
    """What tells that Q [R, C] is not W rounded, or None; and the residual."""
    if not bool(torch.isfinite(q).all()):
        return "holds NaN or infinite numbers", float("inf")
    w = fitted(q, w) if scaled else w
    size = float(q.norm())
    if size == 0:
        return None, 0.0  # all of the sample is rounded to zero, which 2 bits may do: it tells nothing
    residual = float((q - w).norm()) / size
    cosine = float((q * w).sum()) / (size * max(float(w.norm()), torch.finfo(torch.float64).tiny))
    least = (_LEAST_FITTED if scaled else _LEAST).get(rules.bits or 2, 0.3)
    told = f"differs from the reference's by {residual:.2f} of its size"
    if cosine < least:
        return f"{told}: its cosine with it is {cosine:.2f} (a rounded copy: {least} or more)", residual
    fault = _of_groups(GroupStructure(q, w), rules, residual) if rules.grouped else None
    return (None if fault is None else f"{told}{fault}"), residual


def _of_groups(groups: "GroupStructure", rules: Rules, residual: float) -> str | None:
    fine = (rules.bits is None or rules.bits >= 8) and groups.are_fine()
    if fine and residual > _MOST_FINE:
        return f" (a copy in as many values as it takes: at most {_MOST_FINE})"
    if not fine and groups.steps() > _MOST_STEPS:
        return f", {groups.steps():.1f} of its steps (a rounded copy: at most {_MOST_STEPS})"
    if rules.nearest == "all" or (rules.nearest == "fine" and fine):
        share = groups.swapped()
        if share > _MOST_SWAPPED:
            return f", and orders {share:.1%} of its numbers otherwise (a rounded copy: none)"
    return None


def fitted(q: Tensor, w: Tensor) -> Tensor:
    """W [R, C] behind the factors of its rows and columns that bring it nearest to Q, by alternating least squares."""
    tiny = torch.finfo(torch.float64).tiny
    columns = torch.ones_like(w[:1])
    for _ in range(_PASSES):
        scaled = w * columns
        rows = (q * scaled).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp(min=tiny)
        scaled = w * rows
        columns = (q * scaled).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True).clamp(min=tiny)
    return w * rows * columns


class GroupStructure:
    """Q and W in pieces of 16 neighbours [N, 16], and every pair in a piece."""

    def __init__(self, q: Tensor, w: Tensor) -> None:
        size = min(_GROUP, q.shape[1])
        whole = q.shape[1] // size * size
        self.q, self.w = (matrix[:, :whole].reshape(-1, size) for matrix in (q, w))
        self._over = self.q[:, :, None] - self.q[:, None, :]
        self._least = self.q.abs().amax(1)[:, None, None] * 2**-10  # below it two values of Q are one, in 16 bits

    def are_fine(self) -> bool:
        """Whether Q takes nearly as many values in a piece as W does, and W nearly a value for each of its numbers.

        A W that lies on a coarse grid itself, as one that was read from a 4-bit GGUF file does, tells nothing of Q.
        """
        over = self.w[:, :, None] - self.w[:, None, :]
        alike = (over.abs() <= self.w.abs().amax(1)[:, None, None] * 2**-10).sum(2)
        own = (self._over.abs() <= self._least).sum(2)
        values = float((1 / alike).sum())
        return values >= _FINE * self.w.numel() and float((1 / own).sum()) >= _FINE * values

    def steps(self) -> float:
        """The distance of Q from W, in halves of the gap between a value of Q and the farther of its neighbours."""
        inf = torch.full_like(self._over, torch.inf)
        above = torch.where(self._over < -self._least, -self._over, inf).amin(2)
        below = torch.where(self._over > self._least, self._over, inf).amin(2)
        gap = torch.where(above.isinf(), below, torch.where(below.isinf(), above, torch.maximum(above, below))) / 2
        known = torch.isfinite(gap)
        away = (self.q - self.w)[known].norm()
        return float(away / gap[known].norm()) if bool(known.any()) else 0.0

    def swapped(self) -> float:
        """The share of numbers that are larger in Q than a neighbour, and smaller in W by more than rounding."""
        over = self.w[:, :, None] - self.w[:, None, :]
        size = torch.maximum(self.w.abs()[:, :, None], self.w.abs()[:, None, :])
        return float(((self._over > self._least) & (over < -_ULP * size)).any(2).double().mean())
