"""Hadamard transforms of rows are products with an orthonormal matrix of plus and minus one, of every order used."""

import sys

import pytest
import torch

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.weights import hadamard
from intactkv_eval.weights.hadamard import block_digest, hadamard_rows, has_hadamard

ORDERS = [1, 2, 8, 12, 36, 64, 96, 128, 172, 576, 1536]


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_a_hadamard_matrix_and_inverse_undoes_it(order):
    matrix = hadamard_rows(torch.eye(order, dtype=torch.float64)) * order**0.5
    assert torch.equal(matrix.round().abs(), torch.ones_like(matrix))
    torch.testing.assert_close(matrix, matrix.round(), rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-8)
    x = torch.randn(3, 2, order, dtype=torch.float64)
    torch.testing.assert_close(hadamard_rows(x), x @ matrix / order**0.5)
    torch.testing.assert_close(hadamard_rows(hadamard_rows(x), inverse=True), x)


def test_powers_of_two_are_sylvesters():
    sylvester = torch.ones(1, 1)
    while len(sylvester) < 128:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
        assert torch.equal((hadamard_rows(torch.eye(len(sylvester))) * len(sylvester) ** 0.5).round(), sylvester)


@pytest.mark.parametrize(("heads", "width"), [(4, 16), (12, 8), (32, 5)])
def test_across_blocks_and_within_them_is_the_whole(heads, width):
    """The matrix across heads is H (x) I; with H of the width inside each head it is that of the whole row."""
    matrix = hadamard_rows(torch.eye(heads, dtype=torch.float64))
    x = torch.randn(2, heads * width, dtype=torch.float64)
    expected = torch.einsum("rhd,hk->rkd", x.view(2, heads, width), matrix).reshape(2, -1)
    torch.testing.assert_close(hadamard_rows(x, width), expected)
    torch.testing.assert_close(hadamard_rows(hadamard_rows(x, width), width, inverse=True), x)


def test_sixteen_bits_are_rounded_once():
    x = torch.randn(4, 96).bfloat16()
    assert torch.equal(hadamard_rows(x), hadamard_rows(x.float()).bfloat16())


@pytest.mark.parametrize("order", [3, 6, 9, 14, 924])
def test_orders_without_a_matrix_are_refused(order):
    assert not has_hadamard(order)
    with pytest.raises(UnsupportedModelError, match=f"order {order} is known"):
        hadamard_rows(torch.zeros(1, order))


def test_digests_tell_matrices_apart():
    assert block_digest(12) == block_digest(96)
    assert block_digest(12) != block_digest(20)


def test_without_the_library_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.transform.utils.hadamard", None)
    hadamard._block.cache_clear()
    hadamard._matrix.cache_clear()
    assert hadamard_rows(torch.ones(1, 64))[0, 0] == 8
    with pytest.raises(UnsupportedModelError, match="pip install compressed-tensors"):
        hadamard_rows(torch.ones(1, 12))
