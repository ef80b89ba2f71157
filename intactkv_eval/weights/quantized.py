"""QuantizedWeight: the one form of a quantized matrix that everything after weights/ sees.

    w[o, order[j]] = (codes[o, j] - zeros[o, g]) * scales[o, g],    g = j // group_size

Codes are packed (packing.py); zeros are whole numbers in the range of the codes; a symmetric weight has every zero at
2**(bits-1). `order` is act-order: column j of the codes is input order[j], so that groups are contiguous in the codes;
None where they are so in the inputs. The last group may be short. Knows no model, no quantizer and no file format.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_kernels.bit_planes import PLANES, packed_words
from intactkv_kernels.packing import pack, unpack

BITS = tuple(PLANES)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [O, I] in `bits` bits.

    codes: [O, packed_words(I, bits)] int32. scales: [O, G] float. zeros: [O, G] uint8. order: [I] int32, a permutation,
    or None. G = ceil(I / group_size): per-channel weights have group_size == I. Raises CheckpointError where the shapes
    do not fit together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    in_features: int
    order: Tensor | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 1 <= self.group_size <= self.in_features:
            raise CheckpointError(f"quantized weight: group_size {self.group_size} of a width {self.in_features}")
        groups = -(-self.in_features // self.group_size)
        expected: dict[str, tuple[int, ...]] = {
            "codes": (self.codes.shape[0], packed_words(self.in_features, self.bits)),
            "scales": (self.codes.shape[0], groups),
            "zeros": (self.codes.shape[0], groups),
        }
        if self.order is not None:
            expected["order"] = (self.in_features,)
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise CheckpointError(f"quantized weight: {name} should have shape {shape}, has {found}")

    @property
    def out_features(self) -> int:
        """O."""
        return self.codes.shape[0]

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None = None
    ) -> "QuantizedWeight":
        """Pack unpacked codes [O, I] (uint8, columns in `order`); scales and zeros [O, G]."""
        zeros = zeros.to(torch.uint8).contiguous()
        return cls(pack(codes, bits), scales.contiguous(), zeros, bits, group_size, codes.shape[1], order)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same weight on `device`."""
        order = None if self.order is None else self.order.to(device)
        parts = (self.codes.to(device), self.scales.to(device), self.zeros.to(device))
        return QuantizedWeight(*parts, self.bits, self.group_size, self.in_features, order)

    def digest(self) -> str:
        """SHA-256 over shape and a sample of up to 1024 elements of each tensor: the same wherever it is held."""
        found = hashlib.sha256(f"{self.bits} {self.group_size} {self.in_features}".encode())
        for tensor in (self.codes, self.scales, self.zeros, *(() if self.order is None else (self.order,))):
            flat = tensor.reshape(-1)
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(flat[:: max(1, flat.numel() // 1024)][:1024].double().cpu().numpy().tobytes())
        return found.hexdigest()[:32]

    def unpacked(self) -> Tensor:
        """The codes [O, I] (uint8), columns in `order`."""
        return unpack(self.codes, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [O, I] that the codes stand for, in `dtype` (the scales' own if None).

        Computed in fp32 and rounded once: a code less its zero has at most 9 bits, so the product with a 16-bit scale
        is exact in fp32 and the result equals a multiplication done in 16 bits.
        """
        values = self.unpacked().to(torch.float32)
        values -= self.spread(self.zeros.to(torch.float32))
        values *= self.spread(self.scales.to(torch.float32))
        if self.order is not None:
            values = values[:, torch.argsort(self.order)]
        return values.to(dtype or self.scales.dtype)

    def spread(self, per_group: Tensor) -> Tensor:
        """[O, G] -> [O, I]: each group's number for each of its columns."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]


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
