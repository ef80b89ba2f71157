"""Scheme `token_head` (the IntactKV paper's): each token's row of each head, by its own minimum and maximum.

Keys after RoPE. No row shares a parameter with another.
"""

from dataclasses import dataclass

from torch import Tensor

from intactkv_eval.cache.scheme import round_to_steps


@dataclass(frozen=True)
class TokenHead:
    """Rows [D] rounded to `bits` over their D numbers."""

    bits: int
    group: int = 1
    recent: int = 0

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [D] by itself."""
        return round_to_steps(states, self.bits, dim=-1)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [D] by itself."""
        return round_to_steps(states, self.bits, dim=-1)
