"""A packed weight in planes, one output after the other, for planes.c and planes_tiles.c, which need AVX-512 with bf16.

A row is padded to chunks of 128 codes, 16 * bits bytes each, the first code in the lowest bits of its byte:

    2 bits: four codes a byte    4 bits: two    8 bits: one    3 bits: the low two bits of all, then the third ones
"""

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from intactkv_kernels.bit_planes import PLANES
from intactkv_kernels.native import library
from intactkv_kernels.parts import PackedWeight
from intactkv_kernels.scratch import room

CHUNK = 128
TILE = 1024  # outputs that are dequantized at once: measured; half and twice as many are slower, or no faster
HUGE = 2**21  # bytes of a huge page
# Measured (docs/kernels.md): up to this many rows the product on planes is faster than dequantized tiles.
FEW_ROWS = {2: 40, 3: 40, 4: 40, 8: 16}
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # of scales, as planes.c numbers them


@dataclass(frozen=True, eq=False)
class PlanesWeight(PackedWeight):
    """A weight [O, I] in planes. codes: [O, 16 * bits * chunks] uint8."""

    codes: Tensor

    @staticmethod
    def why_not() -> str | None:
        """Nothing more than cpu.py asks for, where planes.c runs."""
        return None

    @classmethod
    def prepare(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None
    ) -> "PlanesWeight":
        """As cpu.prepare."""
        outputs, inputs = codes.shape
        chunks = F.pad(codes, (0, -inputs % CHUNK)).view(outputs, -1, CHUNK)
        packed = _memory(outputs * chunks.shape[1] * 16 * bits).view(outputs, chunks.shape[1], 16 * bits)
        shift = begin = 0
        for width in PLANES[bits]:
            end = begin + 16 * width
            packed[:, :, begin:end] = _pack((chunks >> shift) & (2**width - 1), width)
            shift, begin = shift + width, end
        kept = scales if scales.dtype in KINDS else scales.float()
        return cls(
            kept.contiguous(), zeros.contiguous(), order, bits, group_size, inputs, outputs, packed.view(outputs, -1)
        )

    def unpacked(self) -> Tensor:
        """The codes [O, I] (uint8) that `prepare` was given."""
        chunks = self.codes.view(self.out_features, -1, 16 * self.bits)
        codes = torch.zeros(*chunks.shape[:2], CHUNK, dtype=torch.uint8)
        shift = begin = 0
        for width in PLANES[self.bits]:
            end = begin + 16 * width
            codes |= _unpack(chunks[:, :, begin:end], width) << shift
            shift, begin = shift + width, end
        return codes.view(self.out_features, -1)[:, : self.in_features].contiguous()

    def most_rows(self) -> int:
        """Up to how many rows `few_rows` is faster than tiles."""
        return FEW_ROWS[self.bits]

    def few_rows(self, x: Tensor) -> Tensor:
        """x [..., I] bf16, in the codes' order -> [..., O]."""
        native, x = library(), x.contiguous()
        assert native is not None
        y = x.new_empty((*x.shape[:-1], self.out_features))
        rows = x.numel() // self.in_features
        if native.planes_product(*self._weight, x.data_ptr(), rows, y.data_ptr()):
            raise MemoryError(f"no memory for {rows} rows of activations")
        return y

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first output, the tile [up to TILE, I] in `dtype`), in order. A tile is overwritten by the thread's next."""
        native = library()
        assert native is not None
        kind = dtype if dtype is torch.bfloat16 else torch.float32
        held = room(TILE * self.in_features, kind).view(TILE, self.in_features)
        for start in range(0, self.out_features, TILE):
            count = min(TILE, self.out_features - start)
            native.planes_dequantize(*self._weight, start, count, kind is torch.float32, held.data_ptr())
            yield start, held[:count].to(dtype)

    @cached_property
    def _weight(self) -> tuple[int, ...]:
        """The weight, as planes.c takes it. Kept: of a small layer's call, asking five tensors is a good part."""
        return (
            self.codes.data_ptr(), self.scales.data_ptr(), self.zeros.data_ptr(), KINDS[self.scales.dtype],
            self.bits, self.in_features, self.out_features, self.group_size,
        )  # fmt: skip


def _pack(codes: Tensor, width: int) -> Tensor:
    """Codes [..., N] of `width` bits -> bytes [..., N * width / 8]."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // width).unbind(-1)
    packed: Tensor = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        packed |= part << (width * place)
    return packed


def _unpack(packed: Tensor, width: int) -> Tensor:
    """The reverse of `_pack`."""
    parts = [(packed >> (width * place)) & (2**width - 1) for place in range(8 // width)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _memory(count: int) -> Tensor:
    """[count] uint8; a large one in huge pages where the system gives them: read from memory it is a fifth faster."""
    if count < HUGE:
        return torch.empty(count, dtype=torch.uint8)
    pages = mmap.mmap(-1, count + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE, begin, count // HUGE * HUGE)
    return whole[begin : begin + count]
