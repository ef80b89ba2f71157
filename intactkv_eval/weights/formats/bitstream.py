"""Dense bit streams: element i of a row is bits [i*b, (i+1)*b) of its 32-bit words, lowest first, across word borders.

The layout of GPTQ's qweight and qzeros and of compressed-tensors' weight_packed; only elements of 3 bits cross.
"""

import torch
from torch import Tensor

SPAN = 32  # elements that fill whole words whatever their width: one step each, so that little is held at once


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Words [R, W] (int32) -> elements [R, count] (uint8). W must be at least ceil(count * bits / 32)."""
    rows, spans = words.shape[0], -(-count // SPAN)
    whole = torch.nn.functional.pad(words, (0, spans * bits - words.shape[1])).view(rows, spans, bits)
    found = torch.empty(rows, spans, SPAN, dtype=torch.uint8, device=words.device)
    for place in range(SPAN):
        word, shift = divmod(place * bits, 32)
        inside = min(bits, 32 - shift)
        value = (whole[:, :, word] >> shift) & (2**inside - 1)
        if inside < bits:
            value = value | ((whole[:, :, word + 1] & (2 ** (bits - inside) - 1)) << inside)
        found[:, :, place] = value
    return found.view(rows, -1)[:, :count]


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Elements [R, C] (each below 2**bits) -> words [R, ceil(C * bits / 32)] (int32)."""
    rows, count = values.shape
    spans = -(-count // SPAN)
    whole = torch.nn.functional.pad(values, (0, spans * SPAN - count)).view(rows, spans, SPAN)
    words = torch.zeros(rows, spans, bits, dtype=torch.int32, device=values.device)
    for place in range(SPAN):
        word, shift = divmod(place * bits, 32)
        value = whole[:, :, place].to(torch.int32)
        words[:, :, word] |= value << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= value >> (32 - shift)
    return words.view(rows, -1)[:, : -(-count * bits // 32)].contiguous()
