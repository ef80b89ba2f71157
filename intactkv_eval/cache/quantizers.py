"""Fake quantization of rows of a KV cache: what would be stored in few bits, given back as floating point.

Scheme `token_head` (the IntactKV paper's): asymmetric, dynamic, min/max over each token's head_dim:

    s = (max(x) - min(x)) / (2**b - 1),  q = clamp(round((x - min(x)) / s), 0, 2**b - 1),  x' = q s + min(x)

With `clip` below 1 both ends are multiplied by it, zero held among them; with `rotate` keys are quantized behind a
Hadamard transform of head_dim and given back without it, so that the cache stays in the model's basis (both QuaRot's).
No row shares a parameter with another, so pivot rows that are exempt have no influence on the rest.
"""

import torch
from torch import Tensor

from intactkv_eval.config import KVSpec
from intactkv_eval.weights.hadamard import hadamard_rows


def fake_quantize(states: Tensor, spec: KVSpec) -> Tensor:
    """Keys (after RoPE) or values [B, H, T, D], each [D] row quantized by itself. Returns a new tensor, same dtype."""
    rows = states.to(torch.float32)
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    if spec.clip < 1:
        low, high = low.clamp(max=0) * spec.clip, high.clamp(min=0) * spec.clip
    top = 2**spec.bits - 1
    # A row of equal numbers has no spread: any step gives code 0, and min(x) comes back exactly.
    step = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.round((rows - low) / step).clamp(0, top)
    return (codes * step + low).to(states.dtype)


def quantize_rows(states: Tensor, spec: KVSpec, positions: Tensor, rotate: bool = False) -> Tensor:
    """`fake_quantize`, but tokens [B, T] at `positions` below `spec.keep` are left alone.

    `rotate`: behind a Hadamard transform of each row, and back. Raises UnsupportedModelError where head_dim has none.
    """
    if rotate:
        turned = fake_quantize(hadamard_rows(states.to(torch.float32)), spec)
        fake = hadamard_rows(turned, inverse=True).to(states.dtype)
    else:
        fake = fake_quantize(states, spec)
    if not spec.keep:
        return fake
    kept = positions.to(states.device) < spec.keep
    return torch.where(kept[:, None, :, None], states, fake)
