"""Dense bit streams: element i of a row is bits [i*b, (i+1)*b) of its 32-bit words, lowest first, across word borders.

The layout of GPTQ's qweight and qzeros and of compressed-tensors' weight_packed; only elements of 3 bits cross.
"""

import torch
from torch import Tensor


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Words [R, W] (int32) -> elements [R, count] (uint8). W must be at least ceil(count * bits / 32)."""
    start = torch.arange(count, device=words.device) * bits
    first, shift = start // 32, start % 32
    last = (start + bits - 1) // 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    values = (wide[:, first] | (wide[:, last] << 32)) >> shift if bits == 3 else wide[:, first] >> shift
    masked: Tensor = values & (2**bits - 1)
    return masked.to(torch.uint8)


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Elements [R, C] (each below 2**bits) -> words [R, ceil(C * bits / 32)] (int32)."""
    rows, count = values.shape
    start = torch.arange(count, device=values.device) * bits
    first, shift = start // 32, start % 32
    placed = values.to(torch.int64) << shift
    words = torch.zeros(rows, -(-count * bits // 32) + 1, dtype=torch.int64, device=values.device)
    words.index_add_(1, first, placed & 0xFFFFFFFF)
    words.index_add_(1, first + 1, placed >> 32)
    words = words[:, :-1]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
