"""Linear layers on packed weights, on the CPU: torch's int4 operator for few rows, dequantize and multiply for many.

Codes of 2, 3 and 4 bits lie in 4-bit containers, codes of 8 bits in two of them (16 * high + low). The int4 operator
takes bf16 activations and computes (container - 8) * scale + shift with scale and shift in bf16; codes are placed in
the middle of the container, so that the shift of a symmetric weight is 0. Many rows, and all of fp16 and fp32, are
multiplied by tiles dequantized exactly, (code - zero) * scale in fp32, rounded once.

The containers lie as torch lays them out for this processor's vector width; `container_block` finds out how.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from intactkv_kernels.native import library

GROUPS = (256, 128, 64, 32)  # the group sizes that torch's operator knows
OUTPUTS = 64  # outputs are padded to whole blocks of the widest layout
TILE = 512  # outputs that are dequantized at once: the tile stays in the cache until it is multiplied
SHIFT = {2: 6, 3: 4, 4: 0, 8: 0}  # what is added to a code, so that the middle of its range lies at 8
# Measured (docs/kernels.md): up to this many rows the operator is faster than a dequantized tile; with and without cc.
FEW_ROWS = {True: 24, False: 256}

_SCRATCH = threading.local()
_INT4 = torch.ops.aten._weight_int4pack_mm_for_cpu.default  # (x, container, group, table)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [O, I] as this kernel wants it.

    containers: one or two (high nibbles second) of torch's packed int4, uint8, O padded to a multiple of 64.
    tables: for each container [I/operator_group, O padded, 2] bf16, scale and shift. scales: [G, O padded] and zeros:
    [G, O padded] uint8, which the tables are made from. order: [I] int64 or None (act-order).
    """

    containers: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    scales: Tensor
    zeros: Tensor
    order: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int

    @cached_property
    def operator_group(self) -> int:
        """The group size that the operator is called with."""
        return self.in_features // self.tables[0].shape[0]


def why_not(bits: int, group_size: int, in_features: int) -> str | None:
    """Why this kernel cannot run a weight, or None where it can."""
    if bits not in SHIFT:
        return f"bits={bits} is none of 2, 3, 4, 8"
    if operator_group(group_size, in_features) is None:
        return f"no multiple of 32 divides group_size={group_size} and in_features={in_features}"
    if container_block() is None:
        return "torch's packed int4 layout on this processor is not known"
    return None


def operator_group(group_size: int, in_features: int) -> int | None:
    """The largest group of the operator whose groups lie inside the weight's."""
    fitting = (size for size in GROUPS if group_size % size == 0 and in_features % size == 0)
    return next(fitting, None)


def prepare(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None = None
) -> PackedWeight:
    """Codes [O, I] (uint8), scales and zeros [O, G] -> the packed weight. Only where `why_not` is None."""
    outputs, inputs = codes.shape
    size = operator_group(group_size, inputs)
    assert size is not None
    shifted = codes + SHIFT[bits]
    containers = (shifted & 15, shifted >> 4) if bits == 8 else (shifted,)
    spare = -outputs % OUTPUTS
    scales, zeros = (F.pad(part.t(), (0, spare)).contiguous() for part in (scales, zeros))
    step = scales.to(torch.bfloat16).float()
    # With 8 bits the high container carries the shift: 16 * (high - 8) + (low - 8) = code - 136.
    middle = 136 if bits == 8 else 8 - SHIFT[bits]
    shift = (middle - zeros.float()) * step
    pairs = ((step, torch.zeros_like(step)), (16 * step, shift)) if bits == 8 else ((step, shift),)
    groups = torch.arange(0, inputs, size) // group_size
    return PackedWeight(
        tuple(_container(part, spare) for part in containers),
        tuple(torch.stack(pair, dim=-1).to(torch.bfloat16)[groups].contiguous() for pair in pairs),
        scales,
        zeros,
        None if order is None else order.long(),
        bits,
        group_size,
        inputs,
        outputs,
    )


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., I] -> y [..., O] in the dtype of x."""
    rows = x.reshape(-1, weight.in_features)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    if x.dtype is torch.bfloat16 and len(rows) <= FEW_ROWS[library() is not None]:
        y = few_rows(rows, weight)
    else:
        y = many_rows(rows, weight)
    if weight.out_features != y.shape[1]:
        y = y[:, : weight.out_features]
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.out_features)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I], columns as the inputs are."""
    whole = torch.cat([tile.t().clone() for _, tile in _tiles(weight, dtype)])[: weight.out_features]
    return whole if weight.order is None else whole[:, torch.argsort(weight.order)]


def codes_of(weight: PackedWeight) -> Tensor:
    """The codes [O, I] (uint8) that `prepare` was given."""
    whole = _codes_tile(weight, 0, weight.scales.shape[1]).t()
    return (whole[: weight.out_features] - SHIFT[weight.bits]).contiguous()


@lru_cache(maxsize=1)
def container_block() -> int | None:
    """How many outputs torch packs into a block here (64 with AVX-512, 32 with AVX2), found by packing known codes."""
    codes = torch.arange(64 * 64).view(64, 64).mul(7).remainder(16).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):
        return None
    fits = (block for block in (64, 32) if torch.equal(_unpacked(packed, block), codes.t()))
    return next(fits, None)


def _container(codes: Tensor, spare: int) -> Tensor:
    parts = F.pad(codes, (0, 0, 0, spare)).view(-1, OUTPUTS, codes.shape[1])
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return torch.cat([pack(part.int(), 1) for part in parts])


def few_rows(rows: Tensor, weight: PackedWeight) -> Tensor:
    """rows [M, I] bf16, in the codes' order -> [M, O padded], by torch's int4 operator."""
    size, rows = weight.operator_group, rows.contiguous()
    y: Tensor = _INT4(rows, weight.containers[0], size, weight.tables[0])
    for container, table in zip(weight.containers[1:], weight.tables[1:], strict=True):
        y = y + _INT4(rows, container, size, table)
    return y


def many_rows(rows: Tensor, weight: PackedWeight) -> Tensor:
    """rows [M, I], in the codes' order -> [M, O padded], by tiles dequantized one after the other."""
    y = rows.new_empty(len(rows), weight.scales.shape[1])
    for start, tile in _tiles(weight, rows.dtype):
        torch.mm(rows, tile, out=y[:, start : start + tile.shape[1]])
    return y


def _tiles(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first output, the tile [I, up to TILE] in `dtype`), in order. A tile is overwritten by the thread's next."""
    outputs = weight.scales.shape[1]
    native = library()
    kind = dtype if native is not None and dtype is torch.bfloat16 else torch.float32
    room = _room(weight.in_features * TILE, kind)
    for start in range(0, outputs, TILE):
        width = min(TILE, outputs - start)
        scales = weight.scales[:, start : start + width].float().contiguous()
        zeros = (weight.zeros[:, start : start + width].float() + SHIFT[weight.bits]).contiguous()
        out = room[: weight.in_features * width].view(weight.in_features, width)
        if native is None:
            codes = _codes_tile(weight, start, width).float()
            groups = torch.arange(weight.in_features) // weight.group_size
            torch.mul(codes.sub_(zeros[groups]), scales[groups], out=out)
        else:
            parts = [part[start : start + width].data_ptr() for part in weight.containers]
            function = native.dequantize_bf16 if kind is torch.bfloat16 else native.dequantize_fp32
            function(
                parts[0], parts[1] if len(parts) > 1 else None, scales.data_ptr(), zeros.data_ptr(),
                weight.in_features, weight.group_size, width, container_block(), out.data_ptr(),
            )  # fmt: skip
        yield start, out.to(dtype)


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's scratch: memory taken anew from the system for every layer costs more than filling it."""
    held: Tensor | None = getattr(_SCRATCH, str(dtype), None)
    if held is None or held.numel() < count:
        with torch.inference_mode(False):  # scratch of inference mode could not be written outside of it
            held = torch.empty(count, dtype=dtype)
        setattr(_SCRATCH, str(dtype), held)
    return held[:count]


def _codes_tile(weight: PackedWeight, start: int, width: int) -> Tensor:
    """Containers [I, width] (uint8) of the outputs from `start`: codes, SHIFT added."""
    block = container_block()
    assert block is not None
    low, *high = (_unpacked(part[start : start + width], block) for part in weight.containers)
    return low + (high[0] << 4) if high else low


def _unpacked(container: Tensor, block: int) -> Tensor:
    """A container of whole blocks [O, I/2] -> its nibbles [I, O] (uint8)."""
    outputs, inputs = container.shape[0], container.shape[1] * 2
    blocks = container.view(outputs // block, inputs, block // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).permute(1, 0, 2).reshape(inputs, outputs)
