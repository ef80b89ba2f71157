"""Round to nearest (RTN): min/max of each group, nothing searched, nothing calibrated.

    q = clamp(round(w / s) + z, 0, 2**b - 1),  w' = (q - z) s
    asymmetric:           s = (max(w, 0) - min(w, 0)) / (2**b - 1),  z = round(-min(w, 0) / s)
    symmetric, z = 2**(b-1):
        gptq              s = 2 max|w| / (2**b - 1)
        quarot, awq       s = max(max|w|, 1e-5) / (2**(b-1) - 1)
        omniquant         s = clamp(max|w| / (2**(b-1) - 1), 1e-5, 1e4)

Zero is kept inside the range of every group, so the zero point always has a code. Scales are rounded to the weight's
own dtype (or that of the checkpoint that will hold them) before the codes are chosen. The same formula serves ranges
that others have chosen, and lets their gradient through.
Source: the setting of the IntactKV tables (asymmetric, min/max); the symmetric forms are those of the released code of
AutoGPTQ, QuaRot, llm-awq and OmniQuant (run with --symmetric --disable_zero_point). The gradient of what is rounded is
that of what is not (Bengio et al. 2013); the zero point has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intactkv_eval.cell.spec import SymmetricFormula
from intactkv_eval.model.matrices import finite_matrix
from intactkv_eval.quantize.method import Block, check_settings, install
from intactkv_eval.weights.gradient import clamp_with_ends, straight_through
from intactkv_eval.weights.quantized import QuantizedWeight, check_bits, check_group_size

_LEAST, _GREATEST = 1e-5, 1e4  # the bounds that the released code puts on a range or a scale


def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: SymmetricFormula | None = None,
    layer: str = "the layer",
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Quantize `weight` [O, I] in groups of `group_size` inputs (-1: the whole row). Scales in `scale_dtype`.

    symmetric: whose formula the symmetric scales follow; None for asymmetric ones.
    Raises ConfigError for bits or a group_size that do not fit; `layer` is its name in that message.
    """
    check_bits(bits)
    limits = group_range(weight.detach(), check_group_size(weight.shape[1], group_size, layer))
    return quantize_in_range(weight, limits, bits, group_size, scale_dtype or weight.dtype, symmetric, layer)


@torch.no_grad()
def quantize_in_range(
    weight: Tensor,
    limits: tuple[Tensor, Tensor],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    symmetric: SymmetricFormula | None = None,
    layer: str = "the layer",
) -> QuantizedWeight:
    """Quantize `weight` [O, I] to codes that reach from the lower to the upper of `limits` [O, G] each.

    What is beyond gets the outermost codes. Symmetric ranges reach as far as the wider side. Raises ConfigError as
    `quantize_rtn` does.
    """
    check_bits(bits)
    size = check_group_size(weight.shape[1], group_size, layer)
    codes, steps, zeros = _rounded(_grouped(weight, size), *limits, bits, symmetric, scale_dtype)
    flat = codes.reshape(weight.shape).to(torch.uint8)
    return QuantizedWeight.from_codes(flat, steps.to(scale_dtype), zeros, bits, size)


def fake_quantize(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    size: int,
    scale_dtype: torch.dtype,
    symmetric: SymmetricFormula | None,
) -> Tensor:
    """What `quantize_in_range` stands for, [O, I] in fp32, unpacked; with a gradient for weight and range."""
    codes, steps, zeros = _rounded(_grouped(weight, size), low, high, bits, symmetric, scale_dtype)
    return ((codes - zeros.unsqueeze(-1)) * steps.unsqueeze(-1)).reshape(weight.shape)


def group_range(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each group of `size` inputs, [O, G] each, in fp32."""
    groups = _grouped(weight, size)
    return groups.amin(dim=-1), groups.amax(dim=-1)


def _rounded(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: SymmetricFormula | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, G, size], steps (the scales as rounded) and zeros [O, G], all in fp32."""
    top = 2**bits - 1
    low, high = clamp_with_ends(low, high=0), clamp_with_ends(high, low=0)
    # A group of zeros has no spread; and a scale must stay a normal number in its dtype, or w / s overflows.
    # fp16 is held to 2**-20, where it still has four bits: its normal numbers end within reach of real weights.
    smallest = 2**-20 if scale_dtype is torch.float16 else torch.finfo(scale_dtype).tiny
    exact = clamp_with_ends(_exact_step(low, high, bits, symmetric), low=smallest)
    steps = straight_through(exact, exact.detach().to(scale_dtype).to(torch.float32))
    with torch.no_grad():
        middle = torch.full_like(steps, 2 ** (bits - 1))
        zeros = torch.round(-low / steps).clamp(0, top) if symmetric is None else middle
    ratios = groups / steps.unsqueeze(-1)
    codes = clamp_with_ends(straight_through(ratios, torch.round(ratios.detach())) + zeros.unsqueeze(-1), 0, top)
    return codes, steps, zeros


def _exact_step(low: Tensor, high: Tensor, bits: int, symmetric: SymmetricFormula | None) -> Tensor:
    """The scale of each group before it is rounded to its dtype."""
    step: Tensor = (high - low) / (2**bits - 1)
    return step if symmetric is None else _SYMMETRIC_STEPS[symmetric](torch.maximum(-low, high), bits)


def _full_range_step(reach: Tensor, bits: int) -> Tensor:
    step: Tensor = 2 * reach / (2**bits - 1)
    return step


def _floored_reach_step(reach: Tensor, bits: int) -> Tensor:
    step: Tensor = clamp_with_ends(reach, low=_LEAST) / (2 ** (bits - 1) - 1)
    return step


def _clamped_step(reach: Tensor, bits: int) -> Tensor:
    return clamp_with_ends(reach / (2 ** (bits - 1) - 1), _LEAST, _GREATEST)


_SYMMETRIC_STEPS: Mapping[SymmetricFormula, Callable[[Tensor, int], Tensor]] = {
    "gptq": _full_range_step,
    "quarot": _floored_reach_step,
    "awq": _floored_reach_step,
    "omniquant": _clamped_step,
}


def _grouped(weight: Tensor, size: int) -> Tensor:
    return weight.to(torch.float32).reshape(weight.shape[0], -1, size)


@dataclass(frozen=True)
class RTN:
    """The method on blocks; it needs no inputs. Scales in fp16, as all checkpoint formats hold them."""

    bits: int
    group_size: int
    symmetric: SymmetricFormula | None = None
    wants_full_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """Every layer of the block."""
        found = {}
        for name, layer in block.layers.items():
            full = f"{block.name}.{name}"
            matrix = finite_matrix(layer, full)
            found[name] = quantize_rtn(matrix, self.bits, self.group_size, self.symmetric, full, torch.float16)
        install(block, found)
        return found
