/* The product of a few rows of x with a weight in planes (planes.h): native.py compiles this, planes.py calls it.
 *
 *     y[m][o] = sum_g scale[o][g] * (sum_(k in g) code[o][k] * x[m][k] - zero[o][g] * sum_(k in g) x[m][k])
 *
 * A code becomes a bf16 without a table: or-ed into the mantissa of 128 it is 128 + code; of 8 bits the low seven make
 * one such number and the eighth another, 256 + code together. The zero is moved by as much, and all of it is exact. */
#include "planes.h"

#ifdef HAS_PLANES
/* What is fetched before its time, as measured: codes AHEAD bytes, scales and zeros NEXT outputs. */
enum { BLOCK = 16, ROWS = 4, AHEAD = 4096, NEXT = 16 };

/* The bits of `from` under `mask`, elsewhere those of `other`. */
INLINE __m512i pick(__m512i from, int mask, __m512i other) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16((short)mask), from, other, 0xCA);
}

/* A chunk -> v[n]: the codes 4 * lane + n, plus 128, in bf16; of 8 bits v[n] + v[n + 4] is the code plus 256. */
INLINE void open_chunk(const uint8_t *p, const int bits, __m512i *v) {
    const __m512i middle = _mm512_set1_epi16(0x4300); /* 128 */
    if (bits == 8) {
        const __m512i lane = _mm512_set_epi32(0x3e003c, 0x3a0038, 0x360034, 0x320030, 0x2e002c, 0x2a0028, 0x260024,
                                              0x220020, 0x1e001c, 0x1a0018, 0x160014, 0x120010, 0xe000c, 0xa0008,
                                              0x60004, 0x20000); /* word l: 2 * l */
        const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
        const __m512i pair[2] = {_mm512_permutex2var_epi16(a, lane, b),
                                 _mm512_permutex2var_epi16(a, _mm512_add_epi16(lane, _mm512_set1_epi16(1)), b)};
        for (int n = 0; n < 4; n++) {
            const __m512i word = _mm512_srli_epi16(pair[n / 2], 8 * (n % 2));
            v[n] = pick(word, 0x7f, middle);
            v[n + 4] = pick(word, 0x80, middle);
        }
    } else if (bits == 4) {
        const __m512i word = _mm512_loadu_si512(p);
        for (int n = 0; n < 4; n++) v[n] = pick(_mm512_srli_epi16(word, 4 * n), 15, middle);
    } else {
        const __m512i word = _mm512_cvtepu8_epi16(load32(p));
        const __m512i third = bits == 3 ? _mm512_slli_epi32(wide_bits(p + 32), 2) : middle;
        for (int n = 0; n < 4; n++) {
            const __m512i upper = bits == 3 ? pick(_mm512_srli_epi16(third, n), 4, middle) : middle;
            v[n] = pick(_mm512_srli_epi16(word, 2 * n), 3, upper);
        }
    }
}

/* Row m of x -> the order of open_chunk, [chunks][4][32], zeros behind its end; and its sums over groups, in fp32. */
static void lay_row(const struct weight *w, const uint16_t *x, uint16_t *laid, float *sums) {
    memset(sums, 0, w->groups * sizeof *sums);
    for (long k = 0; k < w->chunks * CHUNK; k += 32) {
        __m512i four = _mm512_setzero_si512(); /* eight times four numbers */
        if (k < w->inputs) {
            four = _mm512_loadu_si512(x + k);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(four, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(four, _mm512_set1_epi32((int)0xffff0000)));
            sums[k / w->group] += _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        }
        uint16_t *to = laid + k / CHUNK * CHUNK + k % CHUNK / 4;
        for (int n = 0; n < 4; n++)
            _mm_storeu_si128((__m128i *)(to + 32 * n), _mm512_cvtepi64_epi16(_mm512_srli_epi64(four, 16 * n)));
    }
}

/* The scales of output o, one for each unit; -> sum of scale * zero * sum of x for each row of x, lane by lane. */
INLINE void open_scales(const struct weight *w, long o, const float *sums, const int bits, const int rows, float *scale,
                        __m512 *shift) {
    const long repeat = w->group / w->unit;
    const __m512 moved = _mm512_set1_ps(bits == 8 ? 256 : 128);
    for (long g = 0; g < w->groups; g += 16) {
        const __mmask16 mask = left(w->groups - g);
        const __m512 s = scales_at(w, o * w->groups + g, mask);
        const __m512 zero = _mm512_mul_ps(s, _mm512_add_ps(zeros_at(w, o * w->groups + g, mask), moved));
        for (int m = 0; m < rows; m++)
            shift[m] = _mm512_fmadd_ps(zero, _mm512_maskz_loadu_ps(mask, sums + m * w->groups + g), shift[m]);
        if (repeat == 1) {
            _mm512_mask_storeu_ps(scale + g, mask, s);
            continue;
        }
        float group[16];
        _mm512_storeu_ps(group, s);
        for (long i = 0; i < 16 && g + i < w->groups; i++)
            for (long r = 0; r < repeat; r++) scale[(g + i) * repeat + r] = group[i];
    }
}

/* Outputs [first, last) of `rows` rows of x, laid as lay_row does. */
INLINE void multiply(const struct weight *w, const __m512i *x, const float *sums, const int bits, const int rows,
                     long first, long last, uint16_t *y) {
    const long per = CHUNK / w->unit, bytes = 16 * bits;
    float scale[w->groups * (w->group / w->unit) + per + 16];
    memset(scale, 0, sizeof scale); /* the units of the padding stay 0 */
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i unit = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(per == 1 ? 4 : per == 2 ? 3 : 2)); /* fp32 lane j: codes 8j .. 8j+7 */
    for (long o = first; o < last; o++) {
        const uint8_t *p = w->codes + o * w->chunks * bytes;
        __m512 total[ROWS], shift[ROWS];
        for (int m = 0; m < rows; m++) total[m] = shift[m] = _mm512_setzero_ps();
        _mm_prefetch((const char *)w->scales + (o + NEXT) * w->groups * (w->kind == FP32 ? 4 : 2), _MM_HINT_T0);
        _mm_prefetch((const char *)w->zeros + (o + NEXT) * w->groups, _MM_HINT_T0);
        open_scales(w, o, sums, bits, rows, scale, shift);
        for (long c = 0; c < w->chunks; c++, p += bytes) {
            __m512i v[8];
            for (int line = 0; line < bytes; line += 64) _mm_prefetch((const char *)p + AHEAD + line, _MM_HINT_T0);
            open_chunk(p, bits, v);
            const __m512 s = _mm512_permutexvar_ps(unit, _mm512_loadu_ps(scale + c * per));
            for (int m = 0; m < rows; m++) {
                __m512 dot = _mm512_setzero_ps();
                for (int n = 0; n < (bits == 8 ? 8 : 4); n++)
                    dot = _mm512_dpbf16_ps(dot, (__m512bh)v[n], (__m512bh)x[(m * w->chunks + c) * 4 + n % 4]);
                total[m] = _mm512_fmadd_ps(dot, s, total[m]);
            }
        }
        for (int m = 0; m < rows; m++) {
            const float sum = _mm512_reduce_add_ps(_mm512_sub_ps(total[m], shift[m]));
            y[m * w->outputs + o] = (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(sum)), 0);
        }
    }
}

/* A function for each number of bits and rows, so that the compiler knows both. */
typedef void product(const struct weight *w, const __m512i *x, const float *sums, long first, long last, uint16_t *y);
#define PRODUCT(BITS, MANY)                                                                                         \
    static void product##BITS##MANY(const struct weight *w, const __m512i *x, const float *sums, long first, long last, \
                                    uint16_t *y) {                                                                  \
        multiply(w, x, sums, BITS, MANY, first, last, y);                                                           \
    }
#define PRODUCTS(BITS) PRODUCT(BITS, 1) PRODUCT(BITS, 2) PRODUCT(BITS, 3) PRODUCT(BITS, 4)
#define TABLE(BITS) [BITS] = {product##BITS##1, product##BITS##2, product##BITS##3, product##BITS##4}
PRODUCTS(2)
PRODUCTS(3)
PRODUCTS(4)
PRODUCTS(8)
static product *const PRODUCT_OF[9][ROWS] = {TABLE(2), TABLE(3), TABLE(4), TABLE(8)};

/* x: [rows][inputs] bf16 -> y: [rows][outputs] bf16; -> 0, or 1 where there is no memory to lay x out. A block of
 * outputs meets all rows while it lies in the cache. */
int planes_product(const uint8_t *codes, const void *scales, const uint8_t *zeros, long kind, long bits, long inputs,
                    long outputs, long group, const uint16_t *x, long rows, uint16_t *y) {
    const struct weight w = weight_of(codes, scales, zeros, kind, bits, inputs, outputs, group);
    const long stride = w.chunks * CHUNK, size = rows * (stride * 2 + w.groups * 4);
    uint16_t *laid = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!laid && rows) return 1;
    float *sums = (float *)(laid + rows * stride);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long m = 0; m < rows; m++) lay_row(&w, x + m * inputs, laid + m * stride, sums + m * w.groups);
#pragma omp for schedule(static)
        for (long first = 0; first < outputs; first += BLOCK) {
            const long last = first + BLOCK < outputs ? first + BLOCK : outputs;
            for (long m = 0; m < rows; m += ROWS) {
                product *run = PRODUCT_OF[bits][(rows - m < ROWS ? rows - m : ROWS) - 1];
                run(&w, (const __m512i *)(laid + m * stride), sums + m * w.groups, first, last, y + m * outputs);
            }
        }
    }
    free(laid);
    return 0;
}

int has_planes(void) { return 1; }
#else
int has_planes(void) { return 0; }
#endif
