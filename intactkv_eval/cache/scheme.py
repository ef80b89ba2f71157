"""What a scheme of KV quantization is, and the one formula that several of them share.

A scheme gives back as floating point what would be stored in few bits. It knows rows of one layer; which rows are left
alone is the Writer's to say.
"""

from typing import Protocol

import torch
from torch import Tensor


class Scheme(Protocol):
    """How keys and values [B, H, T, D] of a layer are stored. `positions` [B or 1, T] are the rows' places.

    Each method returns a new tensor of the same shape and dtype.
    """

    @property
    def group(self) -> int:
        """Consecutive tokens that are quantized together, T being a multiple of it; 1 where each row is by itself."""
        ...

    @property
    def recent(self) -> int:
        """The newest tokens that are not quantized yet, a multiple of `group`."""
        ...

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """Keys as they stand in the cache: after RoPE."""
        ...

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """Values."""
        ...


def working(states: Tensor) -> Tensor:
    """In fp32 at least: 16 bits hold no codes of 8."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def round_to_steps(states: Tensor, bits: int, dim: int, clip: float = 1.0) -> Tensor:
    """Asymmetric, dynamic rounding with the minimum and maximum over `dim`. Returns a new tensor of the same dtype.

    s = (max(x) - min(x)) / (2**b - 1),  q = clamp(round((x - min(x)) / s), 0, 2**b - 1),  x' = q s + min(x)
    With `clip` below 1 both ends are multiplied by it, zero held among them (QuaRot's).
    """
    rows = working(states)
    low, high = rows.amin(dim=dim, keepdim=True), rows.amax(dim=dim, keepdim=True)
    if clip < 1:
        low, high = low.clamp(max=0) * clip, high.clamp(min=0) * clip
    top = 2**bits - 1
    # Equal numbers have no spread: any step gives code 0, and min(x) comes back exactly.
    step = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.round((rows - low) / step).clamp(0, top)
    rounded: Tensor = (codes * step + low).to(states.dtype)
    return rounded
