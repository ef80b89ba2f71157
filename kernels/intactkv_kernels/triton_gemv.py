"""Decode: few rows of x times a packed matrix, bound by the memory that the codes come from.

A thread owns one chunk (32 columns) of a few output rows: `width` words of each bit plane, read once, wide and
neighbour beside neighbour. Codes are opened in registers, straight into the mantissa of a float: bits 2**b + q, with
the 2**b taken off again in the zero point,

    y[m, o] = sum_chunks scale * (sum_i x[m, i] * (2**b + q[o, i])  -  (2**b + zero) * sum_i x[m, i]) + bias[o].

So a weight costs a shift, a mask and a multiply-add, and no integer is ever converted. Also here: what the prefill
kernel shares (loading and opening of words) and the sum over splits. Knows nothing of tile choice (triton_launch.py).
"""
# ruff: noqa: ANN001, ANN201, ANN202 (Triton gives a meaning to annotations: only tl.constexpr may stand there)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def load_words(
    codes, n, n_ok, chunk, start, words_row, columns,
    WIDTH: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr, RAGGED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Words FROM..FROM+COUNT [N, C, COUNT] of chunks [C] in rows n [N], in the plane that begins at word `start`."""
    lane = FROM + tl.arange(0, COUNT)
    if RAGGED:
        inside = chunk[:, None] * 32 + lane[None, :] * (32 // WIDTH) < columns
    else:  # a mask that is constant within a chunk leaves the load as wide as the alignment allows
        inside = (chunk * 32 < columns)[:, None]
    at = n[:, None, None] * words_row + (start + chunk[:, None] * WIDTH + lane[None, :])[None, :, :]
    return tl.load(codes + at, mask=n_ok[:, None, None] & inside[None, :, :], other=0, eviction_policy=POLICY)


@triton.jit
def open_fields(words, position, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """The fields of WIDTH bits at bit `position` of the words, moved to bit TARGET, all other bits zero."""
    right = tl.maximum(position - TARGET, 0)
    left = tl.maximum(TARGET - position, 0)
    return ((words >> right) << left) & (((1 << WIDTH) - 1) << TARGET)


@triton.jit
def as_float(fields, BITS: tl.constexpr):
    """2**BITS + code as fp32, from codes that lie in the top BITS of the mantissa (bits 23-BITS to 22)."""
    return (fields | ((127 + BITS) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def load_groups(scales, zeros, n, n_ok, group, groups):
    """scales and zeros, in their own dtypes, at n x group (shapes that broadcast)."""
    mask = n_ok & (group < groups)
    at = n * groups + group
    return tl.load(scales + at, mask=mask, other=0.0), tl.load(zeros + at, mask=mask, other=0)


@triton.jit
def zero_offset(zero, BITS: tl.constexpr):
    """What as_float() has to be lessened by: 2**BITS + zero."""
    return zero.to(tl.float32) + (1 << BITS)


@triton.jit
def _total(values, axis: tl.constexpr):
    """tl.sum; spelt out so that the interpreter works also where triton was imported before it was switched on."""
    return tl.reduce(values, axis, tl.standard._sum_combine)


@triton.jit
def _load_chunks(codes, n, n_ok, chunk, words_row, columns, BITS: tl.constexpr, RAGGED: tl.constexpr):
    """All words of the chunks, in two tensors [N, C, ...]: the two planes of 3 bits, the two halves of 8 bits."""
    if BITS == 3:
        words = load_words(codes, n, n_ok, chunk, 0, words_row, columns, 2, 0, 2, RAGGED, "evict_first")
        plane = (columns + 15) // 16
        more = load_words(codes, n, n_ok, chunk, plane, words_row, columns, 1, 0, 1, RAGGED, "evict_first")
    elif BITS == 8:  # one load of all eight words would lay a chunk over two threads
        words = load_words(codes, n, n_ok, chunk, 0, words_row, columns, 8, 0, 4, RAGGED, "evict_first")
        more = load_words(codes, n, n_ok, chunk, 0, words_row, columns, 8, 4, 4, RAGGED, "evict_first")
    else:
        words = load_words(codes, n, n_ok, chunk, 0, words_row, columns, BITS, 0, BITS, RAGGED, "evict_first")
        more = words
    return words, more


@triton.jit
def _open_piece(
    words, START: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, TARGET: tl.constexpr
):
    """Fields [1, N, C, PIECE] of columns START..START+PIECE of every chunk, from words [N, C, COUNT]."""
    which = tl.arange(0, COUNT)[None, None, :] == START * WIDTH // 32
    word = _total(tl.where(which, words, 0), 2)  # picks a register: a thread holds all words of its chunk
    position = START * WIDTH % 32 + tl.arange(0, PIECE) * WIDTH
    return open_fields(word[None, :, :, None], position[None, None, None, :], WIDTH, TARGET)


@triton.jit
def _open_codes(words, more, START: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr):
    """2**BITS + code [1, N, C, PIECE], fp32, of columns START..START+PIECE of every chunk."""
    if BITS == 3:
        fields = _open_piece(words, START, PIECE, 2, 2, 20) | _open_piece(more, START, PIECE, 1, 1, 22)
    elif BITS == 8:
        if START < 16:
            fields = _open_piece(words, START, PIECE, 8, 4, 15)
        else:
            fields = _open_piece(more, START - 16, PIECE, 8, 4, 15)
    else:
        fields = _open_piece(words, START, PIECE, BITS, BITS, 23 - BITS)
    return as_float(fields, BITS)


@triton.jit
def gemv_kernel(
    x, codes, scales, zeros, bias, out, m_size, o_size, i_size, words_row, groups, group_size, split_chunks,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
    PIECE: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of y, or of split program_id(1)'s partial sums where `out` is [splits, M, O]."""
    words_row = words_row // ALIGN * ALIGN  # says to the compiler what is known here
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < o_size
    n = n.to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    m_ok = m < m_size
    first = tl.program_id(1) * split_chunks
    acc = tl.full([BLOCK_M, BLOCK_N, BLOCK_CHUNKS], 0.0, tl.float32)
    for start in range(first, tl.minimum(first + split_chunks, (i_size + 31) // 32), BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        words, more = _load_chunks(codes, n, n_ok, chunk, words_row, i_size, BITS, RAGGED)
        product = tl.full([BLOCK_M, BLOCK_N, BLOCK_CHUNKS, PIECE], 0.0, tl.float32)
        x_sum = tl.full([BLOCK_M, 1, BLOCK_CHUNKS, PIECE], 0.0, tl.float32)
        for begin in tl.static_range(0, 32, PIECE):
            if begin % SPAN == 0:
                group = ((chunk * 32 + begin) // group_size)[None, None, :]
                scale, zero = load_groups(scales, zeros, n[None, :, None], n_ok[None, :, None], group, groups)
            column = ((chunk * 32)[:, None] + (begin + tl.arange(0, PIECE))[None, :])[None, None, :, :]
            x_at = m[:, None, None, None].to(tl.int64) * i_size + column
            values = tl.load(x + x_at, mask=m_ok[:, None, None, None] & (column < i_size), other=0.0).to(tl.float32)
            product += _open_codes(words, more, begin, PIECE, BITS) * values
            x_sum += values
            if (begin + PIECE) % SPAN == 0:
                acc += scale.to(tl.float32) * (_total(product, 3) - zero_offset(zero, BITS) * _total(x_sum, 3))
                product = tl.full([BLOCK_M, BLOCK_N, BLOCK_CHUNKS, PIECE], 0.0, tl.float32)
                x_sum = tl.full([BLOCK_M, 1, BLOCK_CHUNKS, PIECE], 0.0, tl.float32)
    y = _total(acc, 2)
    if bias is not None:
        y += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * m_size + m)[:, None].to(tl.int64) * o_size + n[None, :]
    tl.store(out + at, y, mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def sum_splits_kernel(partial, bias, out, size, o_size, splits, BLOCK: tl.constexpr):
    """out [M, O] = the sum of partial [splits, M, O], always in the same order, plus bias [O]; size = M * O."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    y = tl.full([BLOCK], 0.0, tl.float32)
    source = partial + at
    for _ in range(splits):
        y += tl.load(source, mask=mask, other=0.0)
        source += size
    if bias is not None:
        y += tl.load(bias + at % o_size, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=mask)
