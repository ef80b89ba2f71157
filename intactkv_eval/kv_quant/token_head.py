"""Scheme `token_head`: each token's row of each head has a range of its own and an integer zero point.

    s = (max - min) / (2**b - 1),  z = round(-min / s),  q = clamp(round(x / s) + z, 0, 2**b - 1),  x' = (q - z) s

Zero is a level, so numbers near it stay near it. There are two released forms of it, which differ in the range:

- IntactKV's (Liu et al. 2024; utils/quantizer.py of its code), for keys after RoPE and values alike: min and max of
  the row; s is held between 1e-5 and 1e4, and -min / s between -1e4 and 1e4.
- QuaRot's (Ashkboos et al. 2024; fake_quant/quant_utils.py and rotation_utils.py), where `rotate` is set or `clip` is
  below 1: both ends are multiplied by `clip`; zero is in the range of keys, and need not be in that of values. With
  `rotate` keys are quantized behind a Hadamard transform of head_dim and returned without it, so that the cache stays
  in the model's basis.

Both compute in the model's 16 bits; here all arithmetic is in fp32 at least. No row shares a parameter with another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.kv_quant.scheme import working
from intactkv_eval.weights.hadamard import hadamard_rows

_MIN_STEP, _MAX_STEP, _MAX_ZERO = 1e-5, 1e4, 1e4


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
        rows = working(states)
        if self.rotate:
            turned = quarot_rows(hadamard_rows(rows), self.bits, self.clip, with_zero=True)
            return hadamard_rows(turned, inverse=True).to(states.dtype)
        if self.clip < 1:
            return quarot_rows(rows, self.bits, self.clip, with_zero=True).to(states.dtype)
        return intactkv_rows(rows, self.bits).to(states.dtype)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each [D] by itself."""
        rows = working(states)
        if self.rotate or self.clip < 1:
            return quarot_rows(rows, self.bits, self.clip, with_zero=False).to(states.dtype)
        return intactkv_rows(rows, self.bits).to(states.dtype)


def intactkv_rows(rows: Tensor, bits: int) -> Tensor:
    """Rows [..., D], each rounded as IntactKV's released quantizer does; NaN where one holds infinite numbers."""
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # step - step is 0, or NaN where a row is not finite, which the bounds would hide.
    step = step.clamp(_MIN_STEP, _MAX_STEP) + (step - step)
    zero = (-low / step).clamp(-_MAX_ZERO, _MAX_ZERO).round()
    return _rounded(rows, step, zero, bits)


def quarot_rows(rows: Tensor, bits: int, clip: float, with_zero: bool) -> Tensor:
    """Rows [..., D], each rounded as QuaRot's released quantizer does, the share `clip` of the range being kept.

    with_zero: whether zero is put into the range (keys) or not (values, which QuaRot quantizes in groups).
    A row of equal numbers is returned as it is where the released code returns NaN (a range of nothing, without zero).
    """
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    if with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    low, high = low * clip, high * clip
    nothing = (low == 0) & (high == 0)
    low, high = torch.where(nothing, -1, low), torch.where(nothing, 1, high)
    step = (high - low) / (2**bits - 1)
    return torch.where(step == 0, rows, _rounded(rows, step, torch.round(-low / step), bits))


def _rounded(rows: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    codes = (torch.round(rows / step) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * step
