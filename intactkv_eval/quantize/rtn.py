"""Round to nearest (RTN): min/max of each group, nothing searched, nothing calibrated.

    asymmetric: s = (max(w, 0) - min(w, 0)) / (2**b - 1),  z = round(-min(w, 0) / s)
    symmetric:  s = 2 max|w| / (2**b - 1),                  z = 2**(b-1)
    q = clamp(round(w / s) + z, 0, 2**b - 1)

Zero is kept inside the range of every group, so the zero point always has a code. Scales are rounded to the weight's
own dtype (or that of the checkpoint that will hold them) before the codes are chosen.
Source: the setting of the IntactKV tables (asymmetric, min/max); the symmetric form is GPTQ's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intactkv_eval.quantize.matrices import finite_matrix, set_matrix
from intactkv_eval.quantize.method import Block
from intactkv_eval.weights.quantized import QuantizedWeight, check_bits, check_group_size


def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    layer: str = "the layer",
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Quantize `weight` [O, I] in groups of `group_size` inputs (-1: the whole row). Scales in `scale_dtype`.

    Raises ConfigError for bits or a group_size that do not fit; `layer` is its name in that message.
    """
    check_bits(bits)
    size = check_group_size(weight.shape[1], group_size, layer)
    top = 2**bits - 1
    groups = weight.detach().to(torch.float32).reshape(weight.shape[0], -1, size)
    if symmetric:
        spread = 2 * groups.abs().amax(dim=-1)
    else:
        low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
        spread = high - low
    # A group of zeros has no spread; and a scale must stay a normal number in its dtype, or w / s overflows.
    scale_dtype = scale_dtype or weight.dtype
    # fp16 is held to 2**-20, where it still has four bits: its normal numbers end within reach of real weights.
    smallest = 2**-20 if scale_dtype is torch.float16 else torch.finfo(scale_dtype).tiny
    scales = (spread / top).clamp(min=smallest).to(scale_dtype)
    steps = scales.to(torch.float32)
    zeros = torch.full_like(steps, 2 ** (bits - 1)) if symmetric else torch.round(-low / steps).clamp(0, top)
    codes = (torch.round(groups / steps.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp(0, top)
    flat = codes.reshape(weight.shape).to(torch.uint8)
    return QuantizedWeight.from_codes(flat, scales, zeros, bits, size)


@dataclass(frozen=True)
class RTN:
    """The method on blocks; it needs no inputs. Scales in fp16, as all checkpoint formats hold them."""

    bits: int
    group_size: int
    symmetric: bool = False
    wants_full_inputs: ClassVar[bool] = False

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """Every layer of the block."""
        found = {}
        for name, layer in block.layers.items():
            full = f"{block.name}.{name}"
            matrix = finite_matrix(layer, full)
            found[name] = quantize_rtn(matrix, self.bits, self.group_size, self.symmetric, full, torch.float16)
            set_matrix(layer, found[name])
        return found
