"""Law 8: unpack(pack(x)) = x, exactly, all bit widths, awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intactkv_kernels.bit_planes import PLANES, packed_words
from intactkv_kernels.packing import pack, unpack


@given(
    bits=st.sampled_from(sorted(PLANES)), rows=st.integers(1, 9), columns=st.integers(1, 131), seed=st.integers(0, 99)
)
@settings(max_examples=200, deadline=None)
def test_unpack_undoes_pack(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, packed_words(columns, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_every_code_in_every_place(bits):
    """Also the word's sign bit: all codes at their largest."""
    codes = torch.full((1, 32), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 32), codes)
    one_row_each = torch.arange(2**bits, dtype=torch.uint8).repeat_interleave(33).view(-1, 33)
    assert torch.equal(unpack(pack(one_row_each, bits), bits, 33), one_row_each)


def test_size_is_what_the_bits_promise():
    assert {bits: packed_words(128, bits) * 32 / 128 for bits in PLANES} == {2: 2.0, 3: 3.0, 4: 4.0, 8: 8.0}


def test_layout_of_three_bits():
    """The low two bits in the first plane, the high bit in the second, the first code lowest."""
    words = pack(torch.tensor([[0b101, 0b010]], dtype=torch.uint8), 3)
    assert words.tolist() == [[0b1001, 0b01]]
