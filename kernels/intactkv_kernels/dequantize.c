/* Dequantize a tile of torch's packed int4 weight: native.py compiles this, cpu.py calls it.
 *
 *     out[k][n] = (code[k][n] - zero[k / group][n]) * scale[k / group][n]
 *
 * packed: blocks of `block` outputs, [tile / block][inputs][block / 2] bytes; a byte holds output j in its low nibble and
 * output j + block / 2 in its high one. high: the upper nibbles of 8-bit codes in the same layout, or NULL.
 * scale, zero: [groups][tile]. out: [inputs][tile], bf16 rounded to nearest even, or fp32.
 *
 * Plain C for any processor; where it has AVX-512 with bf16, bf16 tiles are made sixteen numbers at a time. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float to_fp32(float value) { return value; }

#define DEQUANTIZE(NAME, TYPE, ROUND)                                                                                \
    void NAME(const uint8_t *packed, const uint8_t *high, const float *scale, const float *zero, long inputs,        \
              long group, long tile, long block, TYPE *restrict out) {                                                       \
        const long half = block / 2;                                                                                \
        _Pragma("omp parallel for schedule(static)") for (long k = 0; k < inputs; k++) {                            \
            const float *s = scale + (k / group) * tile, *z = zero + (k / group) * tile;                            \
            TYPE *row = out + k * tile;                                                                             \
            for (long n = 0; n < tile; n += block) {                                                                \
                const uint8_t *p = packed + (n / block * inputs + k) * half;                                        \
                const uint8_t *h = high ? high + (n / block * inputs + k) * half : NULL;                            \
                if (h) {                                                                                            \
                    for (long j = 0; j < half; j++)                                                                 \
                        row[n + j] = ROUND(((float)((p[j] & 15) | (h[j] & 15) << 4) - z[n + j]) * s[n + j]);        \
                    for (long j = 0; j < half; j++)                                                                 \
                        row[n + half + j] = ROUND(((float)(p[j] >> 4 | (h[j] & 240)) - z[n + half + j]) * s[n + half + j]); \
                    continue;                                                                                       \
                }                                                                                                   \
                for (long j = 0; j < half; j++)                                                                     \
                    row[n + j] = ROUND(((float)(p[j] & 15) - z[n + j]) * s[n + j]);                                 \
                for (long j = 0; j < half; j++)                                                                     \
                    row[n + half + j] = ROUND(((float)(p[j] >> 4) - z[n + half + j]) * s[n + half + j]);            \
            }                                                                                                       \
        }                                                                                                           \
    }

DEQUANTIZE(dequantize_fp32, float, to_fp32)

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

DEQUANTIZE(dequantize_bf16_plain, uint16_t, to_bf16)

enum { ROWS = 64, BLOCK = 64, LANES = 16 };

/* Thirty-two codes in bytes -> thirty-two bf16, rounded to nearest even. */
static inline __m512i make(__m256i codes, const __m512 *scale, const __m512 *zero) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)));
    low = _mm512_mul_ps(_mm512_sub_ps(low, zero[0]), scale[0]);
    high = _mm512_mul_ps(_mm512_sub_ps(high, zero[1]), scale[1]);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* One block of outputs, inputs [first, last): scales and zeros stay in registers for as long as a group lasts. */
static void make_block(const uint8_t *p, const uint8_t *h, const float *scale, const float *zero, long first,
                       long last, long group, long tile, uint16_t *out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m512 s[4], z[4];
    for (long k = first; k < last; k++) {
        if (k == first || k % group == 0)
            for (int part = 0; part < 4; part++) {
                s[part] = _mm512_loadu_ps(scale + (k / group) * tile + part * LANES);
                z[part] = _mm512_loadu_ps(zero + (k / group) * tile + part * LANES);
            }
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(p + k * (BLOCK / 2)));
        __m256i low = _mm256_and_si256(bytes, nibble);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        if (h) {
            __m256i upper = _mm256_loadu_si256((const __m256i *)(h + k * (BLOCK / 2)));
            low = _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(upper, nibble), 4));
            high = _mm256_or_si256(high, _mm256_andnot_si256(nibble, upper));
        }
        _mm512_storeu_si512(out + k * tile, make(low, s, z));
        _mm512_storeu_si512(out + k * tile + BLOCK / 2, make(high, s + 2, z + 2));
    }
}

void dequantize_bf16(const uint8_t *packed, const uint8_t *high, const float *scale, const float *zero, long inputs,
                     long group, long tile, long block, uint16_t *out) {
    if (block != BLOCK) {
        dequantize_bf16_plain(packed, high, scale, zero, inputs, group, tile, block, out);
        return;
    }
    const long blocks = tile / BLOCK, spans = (inputs + ROWS - 1) / ROWS, size = inputs * (BLOCK / 2);
#pragma omp parallel for schedule(static)
    for (long work = 0; work < blocks * spans; work++) {
        const long n = work / spans, first = work % spans * ROWS;
        const long last = first + ROWS < inputs ? first + ROWS : inputs;
        make_block(packed + n * size, high ? high + n * size : NULL, scale + n * BLOCK, zero + n * BLOCK, first, last,
                   group, tile, out + n * BLOCK);
    }
}
#else
DEQUANTIZE(dequantize_bf16, uint16_t, to_bf16)
#endif
