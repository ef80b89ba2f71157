"""Scheme `channel_key` (KIVI, Liu et al. 2024, section 3): keys by channel, values by token, recent tokens in full.

    s = (max - min) / (2**b - 1),  q = round((x - min) / s),  x' = q s + min         (min is kept as it is)

Keys, after RoPE: the range of each channel over `group` consecutive tokens. Values: that of `group` channels of a
token, or of all D where a head has fewer (the last group is shorter where D is no multiple of it). Which rows are old
enough is in group_cache.py. The released code (quant/new_pack.py) computes in 16 bits; here it is in fp32 at least.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.kv_quant.scheme import working


@dataclass(frozen=True)
class ChannelKey:
    """Groups of `group` tokens, rounded to `bits` once they are old enough: `recent` is KIVI's residual length."""

    bits: int
    group: int
    recent: int

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, N * group, D], each [group] of a channel by itself."""
        rows, heads, _, width = states.shape
        grouped = states.reshape(rows, heads, -1, self.group, width)
        return _round_to_steps(grouped, self.bits, dim=3).reshape(states.shape)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [group] of a token's channels by itself."""
        parts = torch.split(states, min(self.group, states.shape[-1]), dim=-1)  # type: ignore[no-untyped-call]
        return torch.cat([_round_to_steps(part, self.bits, dim=-1) for part in parts], dim=-1)


def _round_to_steps(states: Tensor, bits: int, dim: int) -> Tensor:
    """A new tensor of the same dtype, rounded between the minimum and maximum over `dim`."""
    rows = working(states)
    low, high = rows.amin(dim=dim, keepdim=True), rows.amax(dim=dim, keepdim=True)
    top = 2**bits - 1
    # Equal numbers have no spread (the released code divides by 0): any step gives code 0, and min comes back exactly.
    step = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.round((rows - low) / step).clamp(0, top)
    rounded: Tensor = (codes * step + low).to(states.dtype)
    return rounded
