"""How the bits of a code are split into planes: the one layout of packed weights. Knows no tensors.

Codes of a row are split into bit planes whose width divides 32, so no code crosses a word. Plane follows plane along
the row; the 3-bit code is its low two bits in the first plane and its high bit in the second.
"""

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The widths of the planes, by the bits of a code."""
WORD_BITS = 32


def plane_words(columns: int, width: int) -> int:
    """Words that a plane of `width` bits needs for `columns` codes."""
    per_word = WORD_BITS // width
    return -(-columns // per_word)


def packed_words(columns: int, bits: int) -> int:
    """Words in a packed row of `columns` codes of `bits` bits."""
    return sum(plane_words(columns, width) for width in PLANES[bits])
