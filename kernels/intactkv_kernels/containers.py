"""A packed weight in torch's own packed int4 layout: the layout of the cpu backend where planes.c does not run.

Codes of 2, 3 and 4 bits lie in 4-bit containers, codes of 8 bits in two of them (16 * high + low). The int4 operator
takes bf16 activations and computes (container - 8) * scale + shift with scale and shift in bf16; codes are placed in
the middle of the container, so that the shift of a symmetric weight is 0.

The containers lie as torch lays them out for this processor's vector width; `container_block` finds out how.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from intactkv_kernels.native import library
from intactkv_kernels.parts import PackedWeight
from intactkv_kernels.scratch import room

GROUPS = (256, 128, 64, 32)  # the group sizes that torch's operator knows
OUTPUTS = 64  # outputs are padded to whole blocks of the widest layout
TILE = 512  # outputs that are dequantized at once: the tile stays in the cache until it is multiplied
SHIFT = {2: 6, 3: 4, 4: 0, 8: 0}  # what is added to a code, so that the middle of its range lies at 8
# Measured (docs/kernels.md): up to this many rows the operator is faster than a dequantized tile; with and without cc.
FEW_ROWS = {True: 24, False: 256}

_INT4 = torch.ops.aten._weight_int4pack_mm_for_cpu.default  # (x, container, group, table)


@dataclass(frozen=True, eq=False)
class ContainerWeight(PackedWeight):
    """A weight [O, I] as torch's int4 operator wants it.

    containers: [1 or 2 (high nibbles second), O padded to a multiple of 64, I/2] uint8. tables: for each container
    [I/operator group, O padded, 2] bf16, scale and shift.
    """

    containers: Tensor
    tables: Tensor

    @staticmethod
    def why_not() -> str | None:
        """Why no weight can lie so here, or None."""
        return None if container_block() else "torch's packed int4 layout on this processor is not known"

    @classmethod
    def prepare(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None
    ) -> "ContainerWeight":
        """As cpu.prepare."""
        outputs, inputs = codes.shape
        shifted = codes + SHIFT[bits]
        spare = -outputs % OUTPUTS
        step, zero = (F.pad(part.t(), (0, spare)) for part in (scales, zeros))
        step = step.to(torch.bfloat16).float()
        # With 8 bits the high container carries the shift: 16 * (high - 8) + (low - 8) = code - 136.
        middle = 136 if bits == 8 else 8 - SHIFT[bits]
        shift = (middle - zero.float()) * step
        pairs = ((step, torch.zeros_like(step)), (16 * step, shift)) if bits == 8 else ((step, shift),)
        groups = torch.arange(0, inputs, operator_group(group_size, inputs)) // group_size
        halves = (shifted & 15, shifted >> 4) if bits == 8 else (shifted,)
        containers = torch.stack([_container(part, spare) for part in halves])
        tables = torch.stack([torch.stack(pair, dim=-1).to(torch.bfloat16)[groups] for pair in pairs])
        return cls(
            scales.contiguous(), zeros.contiguous(), order, bits, group_size, inputs, outputs, containers, tables
        )

    def unpacked(self) -> Tensor:
        """The codes [O, I] (uint8) that `prepare` was given."""
        whole = _codes(self.containers)[: self.out_features]
        return (whole - SHIFT[self.bits]).contiguous()

    def most_rows(self) -> int:
        """Up to how many rows `few_rows` is faster than tiles."""
        return FEW_ROWS[library() is not None]

    def few_rows(self, x: Tensor) -> Tensor:
        """x [..., I] bf16, in the codes' order -> [..., O], by torch's int4 operator."""
        rows, size = x.reshape(-1, self.in_features).contiguous(), self.in_features // self.tables.shape[1]
        y: Tensor = _INT4(rows, self.containers[0], size, self.tables[0])
        if len(self.containers) > 1:
            y = y + _INT4(rows, self.containers[1], size, self.tables[1])
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first output, the tile [up to TILE, I] in `dtype`), in order. A tile is overwritten by the thread's next."""
        native = library()
        kind = dtype if native is not None and dtype is torch.bfloat16 else torch.float32
        held = room(self.in_features * TILE, kind)
        for start in range(0, self.out_features, TILE):
            count = min(TILE, self.out_features - start)
            width = count + -count % OUTPUTS
            tile = held[: self.in_features * width].view(self.in_features, width)
            parts = self.containers[:, start : start + width]
            scales = F.pad(self.scales[start : start + count].float(), (0, 0, 0, width - count)).t().contiguous()
            zeros = self.zeros[start : start + count].float() + SHIFT[self.bits]
            zeros = F.pad(zeros, (0, 0, 0, width - count)).t().contiguous()
            if native is None:
                groups = torch.arange(self.in_features) // self.group_size
                torch.mul(_codes(parts).t().float().sub_(zeros[groups]), scales[groups], out=tile)
            else:
                function = native.dequantize_bf16 if kind is torch.bfloat16 else native.dequantize_fp32
                function(
                    parts[0].data_ptr(), parts[1].data_ptr() if len(parts) > 1 else None, scales.data_ptr(),
                    zeros.data_ptr(), self.in_features, self.group_size, width, container_block(), tile.data_ptr(),
                )  # fmt: skip
            yield start, tile.t()[:count].to(dtype)


def operator_group(group_size: int, in_features: int) -> int:
    """The largest group of the operator whose groups lie inside the weight's; cpu.why_not sees to it that 32 fits."""
    return next(size for size in GROUPS if group_size % size == 0 and in_features % size == 0)


@lru_cache(maxsize=1)
def container_block() -> int | None:
    """How many outputs torch packs into a block here (64 with AVX-512, 32 with AVX2), found by packing known codes."""
    codes = torch.arange(64 * 64).view(64, 64).mul(7).remainder(16).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):
        return None
    fits = (block for block in (64, 32) if torch.equal(_unpacked(packed, block), codes))
    return next(fits, None)


def _container(codes: Tensor, spare: int) -> Tensor:
    parts = F.pad(codes, (0, 0, 0, spare)).view(-1, OUTPUTS, codes.shape[1])
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return torch.cat([pack(part.int(), 1) for part in parts])


def _codes(containers: Tensor) -> Tensor:
    """Containers [1 or 2, N, I/2] -> [N, I] (uint8): codes, SHIFT added."""
    block = container_block()
    assert block is not None
    low, *high = (_unpacked(part, block) for part in containers)
    return low + (high[0] << 4) if high else low


def _unpacked(container: Tensor, block: int) -> Tensor:
    """A container of whole blocks [N, I/2] -> its nibbles [N, I] (uint8)."""
    outputs, inputs = container.shape[0], container.shape[1] * 2
    blocks = container.reshape(outputs // block, inputs, block // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(outputs, inputs)
