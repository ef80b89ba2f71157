"""Prefill: many rows of x times a packed matrix, on tensor cores.

Tiles of codes are opened to weights (q - zero) * scale in x's dtype, rounded once as dequantize() rounds them, then
multiplied with fp32 sums; fp32 inputs are multiplied as IEEE fp32. Programs that share a column of codes run side by
side, so that the codes come from memory once and from the L2 cache after that. Knows nothing of tile choice.
"""
# ruff: noqa: ANN001, ANN201, ANN202 (Triton gives a meaning to annotations: only tl.constexpr may stand there)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from intactkv_kernels.triton_gemv import as_float, load_groups, load_words, open_fields, zero_offset


@triton.jit
def _open_plane(
    words,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Fields [N, spans, SPAN] from words [N, C, WIDTH]."""
    position = tl.arange(0, 32 // WIDTH) * WIDTH
    fields = open_fields(words[:, :, :, None], position[None, None, None, :], WIDTH, TARGET)
    return tl.reshape(fields, [BLOCK_N, BLOCK_SPANS, SPAN])


@triton.jit
def _load_step_groups(scales, zeros, n, n_ok, start, group_size, groups, BLOCK_SPANS: tl.constexpr, SPAN: tl.constexpr):
    """scales and zeros [N, spans, 1] of the step that begins at chunk `start`."""
    group = (start * 32 + tl.arange(0, BLOCK_SPANS) * SPAN)[None, :, None] // group_size
    return load_groups(scales, zeros, n[:, None, None], n_ok[:, None, None], group, groups)


@triton.jit
def gemm_kernel(
    x, codes, scales, zeros, bias, out, m_size, o_size, i_size, words_row, groups, group_size, split_chunks,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
    TILES_IN_GROUP: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of y, or of split program_id(1)'s partial sums where `out` is [splits, M, O]."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    BLOCK_K: tl.constexpr = BLOCK_CHUNKS * 32
    BLOCK_SPANS: tl.constexpr = BLOCK_K // SPAN
    words_row = words_row // ALIGN * ALIGN
    tiles_m = (m_size + BLOCK_M - 1) // BLOCK_M
    tiles_n = (o_size + BLOCK_N - 1) // BLOCK_N
    in_group = TILES_IN_GROUP * tiles_n
    top = tl.program_id(0) // in_group * TILES_IN_GROUP
    height = tl.minimum(tiles_m - top, TILES_IN_GROUP)
    m = (top + tl.program_id(0) % in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok, n_ok = m < m_size, n < o_size
    m, n = m.to(tl.int64), n.to(tl.int64)
    first = tl.program_id(1) * split_chunks
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    last = tl.minimum(first + split_chunks, (i_size + 31) // 32)
    scale, zero = _load_step_groups(scales, zeros, n, n_ok, first, group_size, groups, BLOCK_SPANS, SPAN)
    for start in range(first, last, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        words = load_words(codes, n, n_ok, chunk, 0, words_row, i_size, WIDTH, 0, WIDTH, RAGGED, "")
        fields = _open_plane(words, WIDTH, 23 - BITS, BLOCK_N, BLOCK_SPANS, SPAN)
        if BITS == 3:
            high = load_words(codes, n, n_ok, chunk, (i_size + 15) // 16, words_row, i_size, 1, 0, 1, RAGGED, "")
            fields |= _open_plane(high, 1, 22, BLOCK_N, BLOCK_SPANS, SPAN)
        weight = (as_float(fields, BITS) - zero_offset(zero, BITS)) * scale.to(tl.float32)
        weight = tl.trans(tl.reshape(weight.to(x.dtype.element_ty), [BLOCK_N, BLOCK_K]))
        column = start * 32 + tl.arange(0, BLOCK_K)
        x_at = m[:, None] * i_size + column[None, :]
        values = tl.load(x + x_at, mask=m_ok[:, None] & (column < i_size)[None, :], other=0.0)
        # scales of the next step are under way while this one is multiplied
        scale, zero = _load_step_groups(
            scales, zeros, n, n_ok, start + BLOCK_CHUNKS, group_size, groups, BLOCK_SPANS, SPAN
        )
        acc = tl.dot(values, weight, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * m_size + m)[:, None].to(tl.int64) * o_size + n[None, :]
    tl.store(out + at, acc, mask=m_ok[:, None] & n_ok[None, :])
