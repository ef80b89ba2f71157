"""How a Triton kernel is laid over a problem: which kernel, which tile, how many splits of the columns.

Plain Python without Triton, so that the choice can be read and tested anywhere. No autotuning: the same problem on the
same device always runs the same program, and what compile_report.py compiles is what runs.
"""

import math
from dataclasses import dataclass
from typing import Literal

from intactkv_kernels.bit_planes import packed_words

CHUNK = 32  # columns; the smallest span that fills whole words in planes of 1, 2, 4 and 8 bits alike
GEMV_ROWS = 2  # beyond, reading x again for every few rows of codes costs more than the codes; tensor cores pay off
TILES_IN_GROUP = 8  # tiles of rows that walk over the same codes side by side, while those are in the L2 cache

# A multiply-add rounds once and costs half; recent versions of Triton fuse no more unless told to.
FUSE = {"enable_fp_fusion": True}
SUM_OPTIONS: dict[str, int] = {"BLOCK": 256, "num_warps": 4, **FUSE}  # of the sum over splits


@dataclass(frozen=True)
class Problem:
    """x [M, I] of `itemsize` bytes a value, times codes [O, W]."""

    m: int
    o: int
    i: int
    bits: int
    group_size: int
    itemsize: int

    @property
    def words(self) -> int:
        """W, the words of a row of codes."""
        return packed_words(self.i, self.bits)

    @property
    def groups(self) -> int:
        """G, the scales of a row; the last group may be shorter."""
        return ceil_div(self.i, self.group_size)

    @property
    def chunks(self) -> int:
        """Chunks of a row; the last may be shorter."""
        return ceil_div(self.i, CHUNK)

    @property
    def least_bytes(self) -> int:
        """Codes, 16-bit scales, zeros, x and y, each once: what any kernel has to move."""
        weight = self.o * (4 * self.words + 3 * self.groups)
        return weight + self.itemsize * self.m * (self.i + self.o)

    @property
    def span(self) -> int:
        """Neighbouring columns that are sure to share a scale: a power of two, a whole chunk for most group sizes."""
        return CHUNK if self.groups == 1 else min(CHUNK, self.group_size & -self.group_size)

    @property
    def regular(self) -> bool:
        """Whether no chunk is cut short by the end of a row or of a group; the others take more registers."""
        return self.i % CHUNK == 0 and self.span == CHUNK


@dataclass(frozen=True)
class Plan:
    """One launch. A program makes a tile [block_m, block_n] of y, block_chunks * 32 columns a step.

    The columns are shared out among `splits` programs; more than one split means partial sums [splits, M, O] in fp32.
    """

    kernel: Literal["gemv", "gemm"]
    block_m: int
    block_n: int
    block_chunks: int
    splits: int
    num_warps: int
    num_stages: int


def make_plan(problem: Problem, multiprocessors: int) -> Plan:
    """The plan for a device of so many multiprocessors."""
    plan = _gemv_plan if problem.m <= GEMV_ROWS else _gemm_plan
    return plan(problem, multiprocessors)


def grid(problem: Problem, plan: Plan) -> tuple[int, int]:
    """Programs: tiles of y, and splits."""
    return ceil_div(problem.m, plan.block_m) * ceil_div(problem.o, plan.block_n), plan.splits


def chunks_per_split(problem: Problem, plan: Plan) -> int:
    """Chunks that one split walks through, in whole steps."""
    steps = ceil_div(problem.chunks, plan.block_chunks)
    return ceil_div(steps, plan.splits) * plan.block_chunks


def compile_options(problem: Problem, plan: Plan) -> dict[str, int]:
    """The compile-time arguments of a launch, by name: the kernel's own, then Triton's.

    PIECE, columns of x that the decode kernel loads at once: 16 bytes a thread, one word of codes, one scale at most.
    """
    piece = min(4 if problem.bits == 8 or problem.itemsize == 4 else 8, problem.span)
    own = {"PIECE": piece} if plan.kernel == "gemv" else {"TILES_IN_GROUP": TILES_IN_GROUP}
    return {
        "BITS": problem.bits,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_CHUNKS": plan.block_chunks,
        "ALIGN": math.gcd(problem.words, 4),  # every row of codes starts at a multiple of it, so loads can be wide
        "SPAN": problem.span,
        "RAGGED": problem.i % CHUNK != 0,
        **own,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **FUSE,
    }


def ceil_div(value: int, by: int) -> int:
    """value / by, rounded up."""
    return -(-value // by)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def _gemv_plan(problem: Problem, multiprocessors: int) -> Plan:
    """A thread owns one chunk of block_n rows, a warp 1024 columns; up to four warps lie along the columns.

    A thread holds block_m * block_n * 8 sums in registers. Eight warps a multiprocessor are wanted: with 64 bytes a
    thread they keep 16 KB on the way, about what the memory's latency asks for.
    """
    num_warps = min(4, power_of_two(ceil_div(problem.chunks, 32)))
    block_m = power_of_two(problem.m)
    whole = 8 if problem.bits == 2 and block_m == 1 else 4
    block_n = whole if problem.regular else 2
    wanted = ceil_div(8 * multiprocessors, num_warps)
    splits = _splits(problem, 32 * num_warps, ceil_div(problem.o, block_n), wanted)
    return Plan("gemv", block_m, block_n, 32 * num_warps, splits, num_warps, num_stages=1)


def _gemm_plan(problem: Problem, multiprocessors: int) -> Plan:
    """Tiles as large as registers and 99 KB of shared memory allow; fp32 runs on plain cores and takes small ones.

    Up to 64 rows the codes are the traffic and tiles are few: narrow tiles, with long steps and many of them on the
    way, and the columns split where tiles are fewer than multiprocessors. Beyond, square tiles where there are enough,
    in half steps where groups are shorter than a chunk.
    """
    m, o = problem.m, problem.o
    block_m = min(128, max(16, power_of_two(m)))
    if problem.itemsize == 4:
        return Plan("gemm", min(32, block_m), 32, 1, 1, num_warps=4, num_stages=2)
    if m <= 64:
        block_chunks = 128 // block_m
        splits = _splits(problem, block_chunks, ceil_div(o, 32), multiprocessors)
        return Plan("gemm", block_m, 32, block_chunks, splits, num_warps=4, num_stages=4)
    square = problem.regular and ceil_div(m, 128) * ceil_div(o, 128) >= 2 * multiprocessors
    block_chunks = 2 if problem.span == CHUNK else 1
    return Plan("gemm", 128, 128 if square else 64, block_chunks, 1, num_warps=8 if square else 4, num_stages=3)


def _splits(problem: Problem, block_chunks: int, tiles: int, wanted: int) -> int:
    """The fewest splits that give `wanted` programs, none without a step, while partial sums add a tenth of the bytes
    at most.
    """
    steps = ceil_div(problem.chunks, block_chunks)
    room = problem.least_bytes // 10 // (2 * 4 * problem.m * problem.o)
    splits = max(1, min(steps, ceil_div(wanted, tiles), room))
    return ceil_div(steps, ceil_div(steps, splits))
