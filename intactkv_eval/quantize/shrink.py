"""Ranges shrunk to where rounding errs least, as GPTQ's and QuaRot's code search them before the codes are chosen.

    p = argmin sum |Q(w; p low, p high) - w|**2.4   of each group,   p in {1, 0.99, ..., 0.21}

Source: QuaRot, weight clipping of its GPTQ (grid 100, shrunk by up to 0.8, norm 2.4).
"""

import torch
from torch import Tensor

from intactkv_eval.cell.spec import SymmetricFormula
from intactkv_eval.quantize.rtn import fake_quantize, group_range

_GRID, _MOST, _NORM = 100, 0.8, 2.4


@torch.no_grad()
def shrunk_range(
    weight: Tensor, bits: int, size: int, symmetric: SymmetricFormula | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The range [O, G] each (lowest, highest) of the groups of `size` inputs of `weight` [O, I]."""
    low, high = group_range(weight, size)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for step in range(int(_GRID * _MOST)):
        share = 1 - step / _GRID
        rounded = fake_quantize(weight, low * share, high * share, bits, size, scale_dtype, symmetric)
        error = (rounded - weight).abs().pow(_NORM).view(*low.shape, size).sum(dim=-1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return low * best, high * best
