"""Linear layers on packed weights, on the CPU: a layout's own product for few rows, dequantize and multiply for many.

The layout is planes.py's where the processor and a compiler allow it, else containers.py's; no weight lies in both.
Many rows, and all of fp16 and fp32, are multiplied by tiles dequantized exactly:

    y[:, start : start + TILE] = x @ tile.T,    tile = (code - zero) * scale in fp32, rounded once
"""

import torch
from torch import Tensor

from intactkv_kernels.containers import ContainerWeight
from intactkv_kernels.native import has_planes
from intactkv_kernels.planes import PlanesWeight

CpuWeight = PlanesWeight | ContainerWeight


def layout() -> type[PlanesWeight] | type[ContainerWeight]:
    """The layout of weights on this machine."""
    return PlanesWeight if has_planes() else ContainerWeight


def why_not(bits: int, group_size: int, in_features: int) -> str | None:
    """Why this kernel cannot run a weight, or None where it can."""
    if bits not in {2, 3, 4, 8}:
        return f"bits={bits} is none of 2, 3, 4, 8"
    if group_size % 32 or in_features % 32:
        return f"no multiple of 32 divides group_size={group_size} and in_features={in_features}"
    return layout().why_not()


def prepare(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None = None
) -> CpuWeight:
    """Codes [O, I] (uint8), scales and zeros [O, G] -> the packed weight. Only where `why_not` is None."""
    return layout().prepare(codes, scales, zeros, bits, group_size, None if order is None else order.long())


def linear(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., I] -> y [..., O] in the dtype of x."""
    if weight.order is not None:
        x = x.index_select(-1, weight.order)
    few = x.dtype is torch.bfloat16 and x.numel() <= weight.most_rows() * weight.in_features
    y = weight.few_rows(x) if few else many_rows(x, weight)
    return y if bias is None else y + bias


def many_rows(x: Tensor, weight: CpuWeight) -> Tensor:
    """x [..., I], in the codes' order -> [..., O], by tiles dequantized one after the other."""
    rows = x.reshape(-1, weight.in_features)
    y = rows.new_empty(len(rows), weight.out_features)
    for start, tile in weight.tiles(rows.dtype):
        if len(tile) > 1:
            torch.mm(rows, tile.t(), out=y[:, start : start + len(tile)])
        else:  # torch 2.10 errs at matrices of one bf16 column whose numbers lie apart, whether it reads or writes them
            y[:, start] = torch.mv(rows, tile[0].contiguous())
    return y.view(*x.shape[:-1], weight.out_features)


def dequantize(weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I], columns as the inputs are."""
    whole = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
    for start, tile in weight.tiles(dtype):
        whole[start : start + len(tile)] = tile
    return whole if weight.order is None else whole[:, torch.argsort(weight.order)]
