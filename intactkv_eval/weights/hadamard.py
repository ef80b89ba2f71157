"""Orthonormal Hadamard transforms of rows, of every order that QuaRot's models need.

    y = x H / sqrt(n),   H of order n = H_2 x ... x H_2 x H_K  (Kronecker),   K = 1, or 4 times an odd number

The part of powers of two is Sylvester's, as a fast transform; H_K comes from compressed-tensors, which holds those up
to 256, made unique by a first column of ones (the library draws its rows' signs). Where neither fits, no matrix of that
order is known to us: `has_hadamard` says so. Knows no model.
Source: QuaRot (Ashkboos et al., 2024), section 3 and hadamard_utils.py of its code.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from intactkv_eval.errors import UnsupportedModelError

_LARGEST_BLOCK = 256
_RADIX_BITS = 5  # a radix of 32: few passes over the data, and each a small matrix product


def has_hadamard(order: int) -> bool:
    """Whether a matrix of this order is known: a power of two, or one times K = 4 * odd, up to 256."""
    return order >= 1 and 0 < block_order(order) <= _LARGEST_BLOCK


def block_order(order: int) -> int:
    """K: 1 for a power of two, the odd part of `order` times 4, or 0 where 4 does not divide it."""
    odd = order // (order & -order)
    if odd == 1:
        return 1
    return 4 * odd if order % 4 == 0 else 0


def hadamard_rows(x: Tensor, width: int = 1, inverse: bool = False) -> Tensor:
    """x [..., n * width] -> the same shape and dtype, transformed across its n blocks of `width` numbers.

    width 1 is the transform of whole rows. Computed in fp64 where x is, else in fp32. `inverse` undoes it (H is not
    symmetric where K > 1). Raises UnsupportedModelError where no matrix of order n is known, or can be had.
    """
    order = x.shape[-1] // width
    if order * width != x.shape[-1] or not has_hadamard(order):
        raise UnsupportedModelError(
            f"no Hadamard matrix of order {x.shape[-1] / width:g} is known (powers of two times 1, 12, 20, 28, ... 256)"
        )
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    block = block_order(order)
    left, right = 1, x.shape[-1]
    for factor in (*_radices(order // block), block):
        right //= factor
        if factor > 1:
            matrix = _matrix(factor, rows.device, rows.dtype)
            parts = rows.view(len(rows) * left, factor, right)
            matrix = matrix if inverse else matrix.t()
            rows = (parts.squeeze(-1) @ matrix.t() if right == 1 else matrix @ parts).reshape(len(rows), -1)
        left *= factor
    return rows.mul(order**-0.5).to(x.dtype).view(x.shape)


def block_digest(order: int) -> str:
    """SHA-256 (16 digits) of H_K for a row of `order`: what a checkpoint keeps, as K's matrix is another package's."""
    matrix = _block(block_order(order)).to(torch.int8)
    return hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16]


def _radices(power: int) -> list[int]:
    """A power of two as a product of factors of up to 32, about equal."""
    bits = power.bit_length() - 1
    count = -(-bits // _RADIX_BITS)
    return [2 ** ((bits + place) // count) for place in range(count)]


@lru_cache(maxsize=64)
def _matrix(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1) if order & (order - 1) == 0 else _block(order)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device, dtype)


@lru_cache(maxsize=16)
def _block(order: int) -> Tensor:
    """H_K [K, K], fp32, with a first column of ones."""
    if order == 1:
        return torch.ones(1, 1)
    try:
        from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix  # noqa: PLC0415  optional
    except ImportError as error:
        raise UnsupportedModelError(
            f"a Hadamard matrix of order {order} is read from compressed-tensors, which cannot be imported ({error}): "
            "pip install compressed-tensors"
        ) from None
    drawn = random_hadamard_matrix(order, dtype=torch.float32, gen=torch.Generator().manual_seed(0))
    matrix: Tensor = drawn * drawn[:, :1].sign()
    if not torch.equal(matrix @ matrix.t(), order * torch.eye(order)):
        raise UnsupportedModelError(f"compressed-tensors gave no Hadamard matrix of order {order}: update it")
    return matrix
