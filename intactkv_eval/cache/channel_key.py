"""Scheme `channel_key` (KIVI, Liu et al. 2024, section 3): keys by channel, values by token, recent tokens in full.

Keys, after RoPE: the minimum and maximum of each channel over `group` consecutive tokens. Values: those of `group`
channels of a token, or of all D where a head has fewer (the last group is shorter where D is no multiple of it).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.cache.scheme import round_to_steps


@dataclass(frozen=True)
class ChannelKey:
    """Groups of `group` tokens, rounded to `bits` once they are older than `recent` tokens."""

    bits: int
    group: int
    recent: int

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, N * group, D], each [group] of a channel by itself."""
        rows, heads, _, width = states.shape
        grouped = states.reshape(rows, heads, -1, self.group, width)
        return round_to_steps(grouped, self.bits, dim=3).reshape(states.shape)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [group] of a token's channels by itself."""
        parts = torch.split(states, min(self.group, states.shape[-1]), dim=-1)  # type: ignore[no-untyped-call]
        return torch.cat([round_to_steps(part, self.bits, dim=-1) for part in parts], dim=-1)
