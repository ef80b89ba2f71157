"""y = x W^T + bias for a packed quantized W, on a GPU through Triton: checks, launches, and the workspace.

Few rows of x go to the decode kernel (triton_gemv.py), many to the prefill kernel (triton_gemm.py), as triton_launch.py
says. Act-order is a gather of x before either: inside a kernel, every few rows of codes would gather the same x again.
No atomics anywhere: the same input gives the same bits. Codes are bit planes along the row,

    2 bits: (2,)      3 bits: (2, 1)      4 bits: (4,)      8 bits: (8,)      a plane of width p: 32/p codes a word.
"""

import functools

import torch
from torch import Tensor

from intactkv_kernels.bit_planes import PLANES
from intactkv_kernels.triton_gemm import gemm_kernel
from intactkv_kernels.triton_gemv import gemv_kernel, sum_splits_kernel
from intactkv_kernels.triton_launch import (
    SUM_OPTIONS,
    Plan,
    Problem,
    ceil_div,
    chunks_per_split,
    compile_options,
    grid,
    make_plan,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def triton_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """y[m, o] = sum_j x[m, order[j]] * (codes[o, j] - zeros[o, g]) * scales[o, g] + bias[o],  g = j // group_size.

    x: [M, I] fp16, bf16 or fp32. codes: [O, W] int32, packed as above. scales: [O, G] float. zeros: [O, G] uint8.
    order: [I] int32 or None, the input that each column of the codes belongs to. bias: [O] float or None. y: [M, O] in
    x's dtype, in `out` where given. workspace: fp32, splits * M * O values for the partial sums, made where not given.
    plan: the tile choice, make_plan's where not given. Raises ValueError where shapes or dtypes do not fit together.
    """
    _check(x, codes, scales, zeros, bits, group_size, order, bias)
    (m, i), o = x.shape, codes.shape[0]
    out = torch.empty(m, o, dtype=x.dtype, device=x.device) if out is None else out
    if out.shape != (m, o) or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out: expected contiguous {[m, o]} of {x.dtype}, got {list(out.shape)} of {out.dtype}")
    if out.numel() == 0:
        return out
    x = x.contiguous() if order is None else x.index_select(1, order)
    problem = Problem(m, o, i, bits, group_size, x.element_size())
    plan = plan or make_plan(problem, multiprocessors(x.device))
    size = plan.splits * m * o if plan.splits > 1 else 0
    workspace = torch.empty(size, dtype=torch.float32, device=x.device) if workspace is None else workspace
    if workspace.numel() < size or workspace.dtype != torch.float32 or not workspace.is_contiguous():
        raise ValueError(f"workspace: expected {size} contiguous fp32 values, got {workspace.numel()}")
    # Triton launches on the current device, which with several need not be x's.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if plan.splits == 1:
            _launch(problem, plan, x, (codes, scales, zeros), bias, out)
            return out
        _launch(problem, plan, x, (codes, scales, zeros), None, workspace)
        blocks = (ceil_div(m * o, SUM_OPTIONS["BLOCK"]),)
        sum_splits_kernel[blocks](workspace, bias, out, m * o, o, plan.splits, **SUM_OPTIONS)
    return out


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 anywhere else (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(
    problem: Problem, plan: Plan, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, out: Tensor
) -> None:
    sizes = (problem.m, problem.o, problem.i, problem.words, problem.groups, problem.group_size)
    kernel = gemv_kernel if plan.kernel == "gemv" else gemm_kernel
    kernel[grid(problem, plan)](
        x, *packed, bias, out, *sizes, chunks_per_split(problem, plan), **compile_options(problem, plan)
    )


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    order: Tensor | None,
    bias: Tensor | None,
) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or bits not in PLANES or group_size < 1:
        raise ValueError(
            f"expected x [M, I], bits of {list(PLANES)} and a group of 1 or more, "
            f"got x {list(x.shape)}, bits={bits}, group_size={group_size}"
        )
    problem = Problem(x.shape[0], codes.shape[0], x.shape[1], bits, group_size, x.element_size())
    o, groups = problem.o, problem.groups
    expected = {
        "x": (x, (problem.m, problem.i), FLOATS),
        "codes": (codes, (o, problem.words), (torch.int32,)),
        "scales": (scales, (o, groups), FLOATS),
        "zeros": (zeros, (o, groups), (torch.uint8,)),
        "order": (order, (problem.i,), (torch.int32,)),
        "bias": (bias, (o,), FLOATS),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {list(shape)} of {' or '.join(map(str, dtypes))} on {x.device}, "
                f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
        if name != "x" and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()}; call .contiguous()")
