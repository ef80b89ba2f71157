"""Bit packing: small unsigned codes into 32-bit words, and back, exactly.

The layout is that of bit_planes.py: a plane of width p holds 32/p codes a word, the first code in the lowest bits.
Knows no scales and no model.
"""

import torch
from torch import Tensor

from intactkv_kernels.bit_planes import PLANES, WORD_BITS, plane_words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [R, C] (uint8, each below 2**bits) into words [R, packed_words(C, bits)] (int32)."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=1)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack words [R, packed_words(C, bits)] (int32) into codes [R, C] (uint8)."""
    codes = torch.zeros(words.shape[0], columns, dtype=torch.uint8, device=words.device)
    start, shift = 0, 0
    for width in PLANES[bits]:
        count = plane_words(columns, width)
        codes |= _unpack_plane(words[:, start : start + count], width, columns) << shift
        start, shift = start + count, shift + width
    return codes


def _pack_plane(values: Tensor, width: int) -> Tensor:
    rows, columns = values.shape
    per_word = WORD_BITS // width
    words = torch.zeros(rows, plane_words(columns, width), dtype=torch.int32, device=values.device)
    for place in range(min(per_word, columns)):
        part = values[:, place::per_word]
        words[:, : part.shape[1]] |= part.to(torch.int32) << (place * width)
    return words


def _unpack_plane(words: Tensor, width: int, columns: int) -> Tensor:
    per_word = WORD_BITS // width
    values = torch.empty(words.shape[0], words.shape[1], per_word, dtype=torch.uint8, device=words.device)
    for place in range(per_word):
        values[:, :, place] = (words >> (place * width)) & (2**width - 1)
    return values.view(words.shape[0], -1)[:, :columns]
