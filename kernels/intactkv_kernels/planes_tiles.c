/* Outputs of a weight in planes (planes.h), dequantized: native.py compiles this, planes.py calls it.
 *
 *     out[o][k] = (code[o][k] - zero[o][k / group]) * scale[o][k / group] in fp32, rounded once */
#include "planes.h"

#ifdef HAS_PLANES
/* Thirty-two codes, from input k on, in words. */
INLINE __m512i codes_at(const uint8_t *row, const int bits, long k) {
    const uint8_t *p = row + k / CHUNK * 16 * bits;
    const long at = k % CHUNK;
    if (bits == 8) return _mm512_cvtepu8_epi16(load32(p + at));
    if (bits == 4) return _mm512_and_si512(wide_bits(p + at / 2), _mm512_set1_epi16(15));
    __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(p + at / 4)));
    byte = _mm512_or_si512(byte, _mm512_slli_epi64(byte, 14)); /* word n of four: the byte shifted right by 2 * n */
    byte = _mm512_or_si512(byte, _mm512_slli_epi64(byte, 28));
    const __m512i low = _mm512_and_si512(byte, _mm512_set1_epi16(3));
    if (bits == 2) return low;
    __mmask32 third;
    memcpy(&third, p + 32 + at / 8, sizeof third);
    return _mm512_mask_add_epi16(low, third, low, _mm512_set1_epi16(4));
}

INLINE __m512 apply(__m512i codes, __m512 scale, __m512 zero) {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero), scale);
}

INLINE void dequantize_row(const struct weight *w, const int bits, long o, const int wide, void *out) {
    const uint8_t *row = w->codes + o * w->chunks * 16 * bits;
    for (long g = 0; g < w->groups; g++) {
        const __m512 scale = _mm512_broadcastss_ps(_mm512_castps512_ps128(scales_at(w, o * w->groups + g, 1)));
        const __m512 zero = _mm512_set1_ps(w->zeros[o * w->groups + g]);
        /* Up to four bits a group has sixteen values, which are made once. */
        const __m512i all = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i values = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(apply(all, scale, zero)));
        const long end = (g + 1) * w->group < w->inputs ? (g + 1) * w->group : w->inputs;
        for (long k = g * w->group; k < end; k += 32) {
            const __m512i codes = codes_at(row, bits, k);
            if (!wide && bits <= 4) {
                _mm512_storeu_si512((uint16_t *)out + k, _mm512_permutexvar_epi16(codes, values));
                continue;
            }
            const __m512 low = apply(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes)), scale, zero);
            const __m512 high = apply(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1)), scale, zero);
            if (wide) {
                _mm512_storeu_ps((float *)out + k, low);
                _mm512_storeu_ps((float *)out + k + 16, high);
            } else {
                _mm512_storeu_si512((uint16_t *)out + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
        }
    }
}

/* Outputs [first, first + count) -> out: [count][inputs], (code - zero) * scale in fp32, as fp32 if `wide`, or rounded
 * to nearest even, as bf16. */
void planes_dequantize(const uint8_t *codes, const void *scales, const uint8_t *zeros, long kind, long bits,
                       long inputs, long outputs, long group, long first, long count, long wide, uint8_t *out) {
    const struct weight w = weight_of(codes, scales, zeros, kind, bits, inputs, outputs, group);
#pragma omp parallel for schedule(static)
    for (long n = 0; n < count; n++) {
        uint8_t *row = out + n * inputs * (wide ? 4 : 2);
        const long o = first + n;
        switch (bits * 2 + (wide != 0)) {
            case 4: dequantize_row(&w, 2, o, 0, row); break;
            case 5: dequantize_row(&w, 2, o, 1, row); break;
            case 6: dequantize_row(&w, 3, o, 0, row); break;
            case 7: dequantize_row(&w, 3, o, 1, row); break;
            case 8: dequantize_row(&w, 4, o, 0, row); break;
            case 9: dequantize_row(&w, 4, o, 1, row); break;
            case 16: dequantize_row(&w, 8, o, 0, row); break;
            default: dequantize_row(&w, 8, o, 1, row);
        }
    }
}
#endif
