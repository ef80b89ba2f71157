"""What the Triton kernels compile to, on a machine without a GPU: registers, shared memory, spills, and bytes moved.

Every kernel is compiled down to machine code for each GPU generation, with the tile choice that would run there, and
the assembler's own figures are read back. Nothing here is a measured time. Ends with 1 where a register was spilled.

    python kernels/compile_report.py [--targets 80 90] [--bits 3 4] [--write docs/kernels.md]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from intactkv_kernels.triton_gemm import gemm_kernel
from intactkv_kernels.triton_gemv import gemv_kernel, sum_splits_kernel
from intactkv_kernels.triton_launch import SUM_OPTIONS, Plan, Problem, chunks_per_split, compile_options, make_plan

# Compute capability: a card of that generation and its multiprocessors, which the tile choice looks at.
TARGETS = {
    80: ("A100", 108),
    86: ("RTX 3090", 82),
    89: ("RTX 4090", 128),
    90: ("H100", 132),
    100: ("B200", 148),
    120: ("RTX 5090", 170),
}
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
TRITON_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHAPES = (
    (1, "fp16", 128),
    (2, "fp16", 128),
    (16, "fp16", 128),
    (64, "fp16", 128),
    (512, "fp16", 128),
    (4096, "fp16", 128),
    (1, "bf16", 128),
    (512, "bf16", 128),
    (1, "fp32", 128),
    (512, "fp32", 128),
    (1, "fp16", 16),
    (512, "fp16", 16),
)  # rows of x, dtype of x, group size; the layer is 4096 x 4096
LAYER = Problem(m=1, o=4096, i=4096, bits=4, group_size=128, itemsize=2)
CELLS = "Each cell: registers a thread / bytes of shared memory a block / bytes spilled a thread."
BYTES = (
    "Counted from the tiles, not measured; groups of 128, x and scales in fp16. Least: codes, scales, zeros, x and y, "
    "each once. Memory: that, and the partial sums there and back, while what programs read again comes from the L2 "
    "cache. Asked: what the loads and stores of all programs add up to before any cache. Act-order adds a gather of x."
)
BEGIN, END = "<!-- compile report -->", "<!-- end of compile report -->"


@dataclass(frozen=True)
class Figures:
    """What the assembler says of one kernel: registers a thread, shared memory a block, spilled bytes a thread."""

    registers: int
    shared: int
    spilled: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.shared} / {self.spilled}"


def memory_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes from and to memory: every operand once, as what programs read again is still in the L2 cache, and the
    partial sums there and back.
    """
    return problem.least_bytes + (8 * plan.splits * problem.m * problem.o if plan.splits > 1 else 0)


def asked_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes that the loads and stores of all programs add up to, before any cache; from the tiles."""
    tiles_m, tiles_n = -(-problem.m // plan.block_m), -(-problem.o // plan.block_n)
    weight = problem.o * (4 * problem.words + 3 * problem.groups)
    x, y = problem.itemsize * problem.m * problem.i, problem.itemsize * problem.m * problem.o
    return weight * tiles_m + x * tiles_n + y + memory_bytes(problem, plan) - problem.least_bytes


def compile_linear(problem: Problem, plan: Plan, dtype: str, target: int) -> Figures:
    """One of the two kernels, specialized as Triton does when it is launched on this problem."""
    kernel = gemv_kernel if plan.kernel == "gemv" else gemm_kernel
    options = compile_options(problem, plan)
    pointers = {"x": f"*{dtype}", "codes": "*i32", "scales": "*fp16", "zeros": "*u8"}
    pointers |= {"out": "*fp32"} if plan.splits > 1 else {"out": f"*{dtype}", "bias": f"*{dtype}"}
    sizes = {
        "m_size": problem.m,
        "o_size": problem.o,
        "i_size": problem.i,
        "words_row": problem.words,
        "groups": problem.groups,
        "group_size": problem.group_size,
        "split_chunks": chunks_per_split(problem, plan),
    }
    return compile_kernel(kernel, pointers, sizes, options, target)


def compile_kernel(
    kernel: Any, pointers: dict[str, str], sizes: dict[str, int], options: dict[str, int], target: int
) -> Figures:
    """Compile to machine code; sizes of 1 and multiples of 16 are known to the compiler, as at a launch.

    An argument that is nowhere named is None.
    """
    constants: dict[str, int | None] = dict.fromkeys(set(kernel.arg_names) - pointers.keys() - sizes.keys())
    constants |= {name: value for name, value in options.items() if name not in TRITON_OPTIONS}
    constants |= {name: 1 for name, value in sizes.items() if value == 1}
    types = {**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [name for name in signature if name not in constants and sizes.get(name, 0) % 16 == 0]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    own = {name: value for name, value in options.items() if name in TRITON_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=own)
    usage = resource_usage(compiled.asm["cubin"])
    return Figures(usage["REG"], compiled.metadata.shared, usage["STACK"] + usage["LOCAL"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """The assembler's figures by name, through the cuobjdump that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = [field.split(":") for field in listing.split() if field.count(":") == 1]
    return {name: int(value) for name, value in fields if value.isdigit()}


def compile_table(targets: list[int], widths: list[int]) -> tuple[list[str], bool]:
    """The rows of the first table, and whether any kernel spilled."""
    names = [f"{TARGETS[target][0]} sm_{target}" for target in targets]
    lines = [f"| kernel | M | x | bits | group | {' | '.join(names)} |", "|---" * (5 + len(names)) + "|"]
    spilled = False
    for bits in widths:
        for m, dtype, group_size in SHAPES:
            problem = replace(LAYER, m=m, bits=bits, group_size=group_size, itemsize=ITEMSIZE[dtype])
            cells = []
            for target in targets:
                plan = make_plan(problem, TARGETS[target][1])
                figures = compile_linear(problem, plan, dtype, target)
                spilled |= figures.spilled > 0
                cells.append(str(figures))
            lines.append(f"| {plan.kernel} | {m} | {dtype} | {bits} | {group_size} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    pointers = {"partial": "*fp32", "bias": "*fp16", "out": "*fp16"}
    sizes = {"size": 16 * LAYER.o, "o_size": LAYER.o, "splits": 3}
    sums = [compile_kernel(sum_splits_kernel, pointers, sizes, SUM_OPTIONS, target) for target in targets]
    lines.append(f"| sum of splits | 16 | fp16 | | | {' | '.join(map(str, sums))} |")
    return lines, spilled or any(figures.spilled for figures in sums)


def traffic_table(targets: list[int], widths: list[int]) -> list[str]:
    """The rows of the second table: bytes of the layer in MB, on that GPU which splits the columns most."""
    lines = ["| M | bits | splits | least MB | memory MB | memory / least | asked MB |", "|---" * 7 + "|"]
    for m in (1, 2, 16, 64, 512):
        for bits in widths:
            problem = replace(LAYER, m=m, bits=bits)
            plan = max((make_plan(problem, TARGETS[target][1]) for target in targets), key=lambda plan: plan.splits)
            least, memory = problem.least_bytes, memory_bytes(problem, plan)
            sizes = f"{least / 1e6:.2f} | {memory / 1e6:.2f} | {memory / least:.3f}"
            lines.append(f"| {m} | {bits} | {plan.splits} | {sizes} | {asked_bytes(problem, plan) / 1e6:.1f} |")
    return lines


def put_between_markers(page: Path, text: str) -> None:
    """Replace what stands between the two marker comments of a page. Raises SystemExit where they are missing."""
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{page}: expected the lines {BEGIN} and {END}, to write between them")
    before, after = old.split(BEGIN)[0], old.split(END)[-1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """The command; 1 where a register was spilled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--bits", type=int, nargs="+", choices=[2, 3, 4, 8], default=[2, 3, 4, 8])
    parser.add_argument("--write", type=Path, help=f"a Markdown page that holds {BEGIN} and {END}; else print")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}:
        raise SystemExit("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
    compiled, spilled = compile_table(arguments.targets, arguments.bits)
    head = f"Compiled with Triton {triton.__version__} for a layer of {LAYER.o} x {LAYER.i}. {CELLS}"
    text = "\n".join([head, "", *compiled, "", BYTES, "", *traffic_table(arguments.targets, arguments.bits)])
    if arguments.write is None:
        print(text)
    else:
        put_between_markers(arguments.write, text)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
