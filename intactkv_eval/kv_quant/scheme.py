"""What a scheme of KV quantization is.

A scheme gives back as floating point what would be stored in few bits. It knows rows of one layer; which rows are left
alone is the Writer's to say.
"""

from typing import Protocol

import torch
from torch import Tensor


class KVScheme(Protocol):
    """How keys and values [B, H, T, D] of a layer are stored. `positions` [B or 1, T] are the rows' places.

    Each method returns a new tensor of the same shape and dtype.
    """

    @property
    def group(self) -> int:
        """Consecutive tokens whose keys are quantized together, T being a multiple of it; 1 where each is by itself."""
        ...

    @property
    def recent(self) -> int:
        """KIVI's residual length, a multiple of `group`: so many keys are quantized at a time, so many values are not.

        0 where rows are quantized as they are written. See kv_cache/grouped.py.
        """
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
