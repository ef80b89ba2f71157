"""QuantizedWeight: the one form of a quantized matrix that everything after weights/ sees.

    w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g],    g = i // group_size

Codes are packed (packing.py); zeros are whole numbers in the range of the codes; a symmetric weight has every zero at
2**(bits-1). Knows no model, no quantizer and no file format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.weights.packing import PLANES, pack, packed_words, unpack

BITS = tuple(PLANES)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [O, I] in `bits` bits.

    codes: [O, packed_words(I, bits)] int32. scales: [O, G] float. zeros: [O, G] uint8. group_size: I/G, so that
    per-channel weights have group_size == I. Raises CheckpointError where the shapes do not fit together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    in_features: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        groups = self.in_features // check_group_size(self.in_features, self.group_size)
        expected = {
            "codes": (self.codes.shape[0], packed_words(self.in_features, self.bits)),
            "scales": (self.codes.shape[0], groups),
            "zeros": (self.codes.shape[0], groups),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise CheckpointError(f"quantized weight: {name} should have shape {shape}, has {found}")

    @property
    def out_features(self) -> int:
        """O."""
        return self.codes.shape[0]

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> "QuantizedWeight":
        """Pack unpacked codes [O, I] (uint8); scales and zeros [O, G]."""
        return cls(pack(codes, bits), scales, zeros.to(torch.uint8), bits, group_size, codes.shape[1])

    def unpacked(self) -> Tensor:
        """The codes [O, I] (uint8)."""
        return unpack(self.codes, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [O, I] that the codes stand for, in `dtype` (the scales' own if None).

        Computed in fp32 and rounded once: a code less its zero has at most 9 bits, so the product with a 16-bit scale
        is exact in fp32 and the result equals a multiplication done in 16 bits.
        """
        shape = (self.out_features, -1, self.group_size)
        whole = self.unpacked().view(shape).to(torch.float32) - self.zeros.unsqueeze(-1).to(torch.float32)
        values = whole * self.scales.unsqueeze(-1).to(torch.float32)
        return values.view(self.out_features, self.in_features).to(dtype or self.scales.dtype)


def check_bits(bits: int) -> int:
    """`bits`, or ConfigError where no packing exists for it."""
    if bits not in PLANES:
        raise ConfigError(f"bits={bits} is not supported for weights: use one of {', '.join(map(str, BITS))}")
    return bits


def check_group_size(in_features: int, group_size: int, layer: str = "the layer") -> int:
    """The number of inputs that share one scale: `group_size`, or the whole width for -1 (per channel).

    Raises ConfigError that names the sizes that fit where it does not divide the width.
    """
    if group_size == -1:
        return in_features
    if group_size < 1 or in_features % group_size:
        fits = [size for size in (16, 32, 64, 96, 128, 192, 256, 512, 1024) if in_features % size == 0]
        raise ConfigError(
            f"group_size={group_size} does not divide the width {in_features} of {layer}: "
            f"use {', '.join(map(str, fits)) + ', or ' if fits else ''}-1 (one scale per output channel)"
        )
    return group_size
