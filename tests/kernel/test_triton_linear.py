"""Law 11 for the Triton kernels: in Triton's interpreter on a CPU, the very same tests on a GPU where there is one."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

# Read where a kernel is defined, so before the imports below.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import triton
from helpers.tolerances import RELATIVE_RMS, relative_rms

from intactkv_kernels.bit_planes import packed_words
from intactkv_kernels.packing import pack
from intactkv_kernels.reference import quantized_linear
from intactkv_kernels.triton_launch import Plan, Problem, chunks_per_split, compile_options, grid, make_plan
from intactkv_kernels.triton_linear import triton_linear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
BITS = (2, 3, 4, 8)
GUARD = 64  # elements before and after a tensor that no kernel may let into a result, nor write
REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@dataclass(frozen=True)
class Case:
    """One problem; group_size -1 is one group, zeros None are random. Everything else random from one seed."""

    m: int = 1
    o: int = 17
    i: int = 100
    bits: int = 4
    group_size: int = 32
    dtype: torch.dtype = FP16
    scale_dtype: torch.dtype = FP16
    ordered: bool = False
    biased: bool = False
    zero: int | None = None
    plan: Plan | None = None

    def __str__(self):
        names = f"{self.m}x{self.o}x{self.i}-w{self.bits}g{self.group_size}-{self.dtype}-{self.scale_dtype}"
        flags = f"{'-ordered' * self.ordered}{'-bias' * self.biased}{f'-zero{self.zero}' * (self.zero is not None)}"
        return (names + flags + (f"-{self.plan.kernel}{self.plan.splits}" if self.plan else "")).replace("torch.", "")


class Layer:
    """The tensors of a case, and its reference."""

    def __init__(self, case):
        torch.manual_seed(0)
        self.case, self.group_size = case, case.i if case.group_size == -1 else case.group_size
        groups = -(-case.i // self.group_size)
        self.codes = torch.randint(0, 2**case.bits, (case.o, case.i), dtype=torch.uint8)
        self.scales = (0.01 + 0.1 * torch.rand(case.o, groups)).to(case.scale_dtype)
        self.zeros = torch.randint(0, 2**case.bits, (case.o, groups), dtype=torch.uint8)
        if case.zero is not None:
            self.zeros.fill_(case.zero)
        self.x = torch.randn(case.m, case.i).to(case.dtype)
        self.order = torch.randperm(case.i, dtype=torch.int32) if case.ordered else None
        self.bias = torch.randn(case.o).to(case.dtype) if case.biased else None

    def expected(self):
        x = self.x if self.order is None else self.x[:, self.order.long()]
        return quantized_linear(x, self.codes, self.scales, self.zeros, self.group_size, self.bias)

    def arguments(self):
        x, scales, codes = framed(self.x), framed(self.scales), framed(pack(self.codes, self.case.bits))
        rest = [None if tensor is None else tensor.to(DEVICE) for tensor in (self.order, self.bias)]
        return x, codes, scales, framed(self.zeros), self.case.bits, self.group_size, *rest

    def run(self):
        """y, after its memory and the partial sums' were filled with NaN; what lies around y must still be NaN."""
        m, o, plan = self.case.m, self.case.o, self.case.plan
        memory = torch.full((m * o + 2 * GUARD,), torch.nan, dtype=self.case.dtype, device=DEVICE)
        y = memory[GUARD : GUARD + m * o].view(m, o)
        workspace = torch.full((plan.splits * m * o,), torch.nan, device=DEVICE) if plan else None
        assert triton_linear(*self.arguments(), out=y, workspace=workspace, plan=plan) is y
        assert memory[:GUARD].isnan().all()
        assert memory[GUARD + m * o :].isnan().all()
        return y.cpu()


def framed(tensor):
    """The same values on the device, with NaN (or ones in every bit) before and after them in memory."""
    worst = torch.nan if tensor.is_floating_point() else 255 if tensor.dtype is torch.uint8 else -1
    memory = torch.full((tensor.numel() + 2 * GUARD,), worst, dtype=tensor.dtype, device=DEVICE)
    inside = memory[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@pytest.fixture(autouse=True)
def interpreted_bf16_dot(monkeypatch):
    """Triton's interpreter keeps bf16 as uint16, and its tl.dot multiplies those integers: widen them first."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype == triton.language.bfloat16:
            a, b = (self.cast_impl(side, triton.language.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def cases():
    for bits in BITS:
        for m in (1, 2, 16, 33):
            yield Case(m=m, o=33, i=576, bits=bits, group_size=64, biased=m > 1)
        for m in (1, 16):
            yield Case(m=m, bits=bits, group_size=64, ordered=True, biased=True)
            yield Case(m=m, o=16, i=128, bits=bits, zero=0)
            yield Case(m=m, o=16, i=128, bits=bits, zero=2**bits - 1)
            for dtype, scale_dtype in ((FP32, FP16), (BF16, BF16), (BF16, FP32)):
                yield Case(m=m, bits=bits, dtype=dtype, scale_dtype=scale_dtype, biased=True)
    for m in (2, 16):
        for o in (1, 17, 33):
            for i in (1, 32, 40):
                yield Case(m=m, o=o, i=i, bits=3)
        for group_size in (1, 7, 16, 64, 96, -1, 1000):
            yield Case(m=m, o=5, bits=3, i=100, group_size=group_size)
            yield Case(m=m, o=5, bits=8, i=128, group_size=group_size, dtype=FP32)
        yield Case(m=m, o=5, i=2400, bits=3, group_size=-1, ordered=True)
    yield Case(m=130, o=130, i=64, bits=4)
    yield Case(m=150, o=70, i=64, plan=Plan("gemm", 16, 32, 2, 1, 4, 2))  # more tiles of rows than run side by side
    for bits in BITS:
        yield Case(m=3, i=2100, bits=bits, biased=True, plan=Plan("gemv", 4, 4, 32, 3, 1, 1))
        yield Case(m=18, i=200, bits=bits, biased=True, ordered=True, plan=Plan("gemm", 16, 32, 2, 4, 4, 2))


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_the_kernel_agrees_with_the_reference(case):
    layer = Layer(case)
    assert relative_rms(layer.run(), layer.expected()) < RELATIVE_RMS[case.dtype]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16])
def test_a_zero_that_is_off_by_one_would_be_seen(m, bits):
    layer = Layer(Case(m=m, o=16, i=576, bits=bits, group_size=64))
    expected = layer.expected()
    layer.zeros ^= 1
    assert relative_rms(layer.run(), expected) > 10 * RELATIVE_RMS[FP16]


@pytest.mark.parametrize(
    "plan", [Plan("gemv", 4, 2, 32, 2, 1, 1), Plan("gemm", 16, 32, 2, 4, 4, 2)], ids=lambda plan: plan.kernel
)
def test_the_same_input_gives_the_same_bits(plan):
    layer = Layer(Case(m=4, i=1100, bits=3, plan=plan))
    assert torch.equal(layer.run(), layer.run())


def test_x_may_be_strided_and_empty():
    layer = Layer(Case(m=3))
    x, *packed = layer.arguments()
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    assert torch.equal(triton_linear(wide, *packed), triton_linear(x, *packed))
    assert triton_linear(x[:0], *packed).shape == (0, 17)


@pytest.mark.parametrize(
    ("position", "name", "change"),
    [
        (0, "x", lambda x: x.double()),
        (1, "codes", lambda codes: codes[:, :-1]),
        (1, "codes", lambda codes: codes.t().contiguous().t()),
        (2, "scales", lambda scales: scales[:, :1]),
        (3, "zeros", lambda zeros: zeros.int()),
        (4, "bits", lambda bits: 5),
        (5, "group_size", lambda group_size: 0),
        (6, "order", lambda order: order.long()),
        (7, "bias", lambda bias: bias[:-1]),
    ],
)
def test_arguments_that_do_not_fit_are_named(position, name, change):
    arguments = list(Layer(Case(ordered=True, biased=True)).arguments())
    arguments[position] = change(arguments[position])
    with pytest.raises(ValueError, match=name):
        triton_linear(*arguments)


def test_memory_that_does_not_fit_is_named():
    layer = Layer(Case(m=2))
    with pytest.raises(ValueError, match="out: expected"):
        triton_linear(*layer.arguments(), out=torch.empty(17, 2, dtype=FP16, device=DEVICE).t())
    plan = Plan("gemv", 2, 4, 32, 3, 1, 1)
    with pytest.raises(ValueError, match="workspace: expected 102"):
        triton_linear(*layer.arguments(), workspace=torch.empty(101, device=DEVICE), plan=plan)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 17, 64, 65, 2048])
@pytest.mark.parametrize(("o", "i"), [(1, 1), (17, 100), (4096, 4096), (1024, 14336), (128256, 4096)])
def test_a_plan_covers_the_problem_once(m, o, i, itemsize, multiprocessors):
    problem = Problem(m, o, i, 4, 128, itemsize)
    plan = make_plan(problem, multiprocessors)
    sizes = (plan.block_m, plan.block_n, plan.block_chunks, plan.num_warps)
    assert all(size > 0 and size & (size - 1) == 0 for size in sizes), "Triton takes powers of two"
    assert plan.block_m >= min(m, 128 if itemsize == 2 else 32)
    tiles, splits = grid(problem, plan)
    assert tiles * plan.block_m * plan.block_n >= m * o
    assert splits == 1 or 8 * splits * m * o <= problem.least_bytes / 10, "partial sums are a tenth of the traffic"
    assert (splits - 1) * chunks_per_split(problem, plan) < problem.chunks <= splits * chunks_per_split(problem, plan)


def test_a_plan_is_what_its_description_says():
    h100, layer = 132, Problem(1, 4096, 4096, 4, 128, 2)
    assert make_plan(layer, h100) == Plan("gemv", 1, 4, 128, 1, 4, 1)
    assert make_plan(replace(layer, m=2), h100).kernel == "gemv"
    assert make_plan(replace(layer, m=3), h100).kernel == "gemm"
    assert make_plan(replace(layer, o=256, i=14336), h100).splits > 1
    assert make_plan(replace(layer, m=16, o=256), h100).splits > 1
    assert make_plan(replace(layer, m=512), h100).splits == 1
    assert make_plan(replace(layer, m=4096), h100).block_n == 128


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("i", [1, 31, 32, 100, 576, 11008])
def test_words_are_counted_as_packing_counts_them(i, bits):
    problem = Problem(1, 1, i, bits, 64, 2)
    assert problem.words == packed_words(i, bits)
    assert problem.words % compile_options(problem, make_plan(problem, 1))["ALIGN"] == 0


def test_the_compile_report_finds_no_spill(tmp_path):
    """Real compilation to machine code, in a process of its own: this one interprets."""
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- compile report -->\nold\n<!-- end of compile report -->\nafter\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "kernels/compile_report.py", "--targets", "90", "--bits", "3", "--write", str(page)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert "sm_90" in written
