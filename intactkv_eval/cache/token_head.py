"""Scheme `token_head` (the IntactKV paper's): each token's row of each head, by its own minimum and maximum.

Keys after RoPE; with `rotate` they are quantized behind a Hadamard transform of head_dim and given back without it, so
that the cache stays in the model's basis (QuaRot's, as the `clip` of the range is).
No row shares a parameter with another.
"""

from dataclasses import dataclass

from torch import Tensor

from intactkv_eval.cache.scheme import round_to_steps, working
from intactkv_eval.weights.hadamard import hadamard_rows


@dataclass(frozen=True)
class TokenHead:
    """Rows [D] rounded to `bits` over their D numbers."""

    bits: int
    rotate: bool = False
    clip: float = 1.0
    group: int = 1
    recent: int = 0

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [D] by itself. Raises UnsupportedModelError where `rotate` has no transform for D."""
        if not self.rotate:
            return round_to_steps(states, self.bits, -1, self.clip)
        turned = round_to_steps(hadamard_rows(working(states)), self.bits, -1, self.clip)
        return hadamard_rows(turned, inverse=True).to(states.dtype)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [D] by itself."""
        return round_to_steps(states, self.bits, -1, self.clip)
