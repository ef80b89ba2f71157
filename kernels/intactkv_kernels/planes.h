/* A weight in planes, and how its bytes, scales and zeros are read: for planes.c and planes_tiles.c.
 *
 * codes: [outputs][chunks][16 * bits] bytes, a chunk 128 inputs, the last one padded. 4 bits: two codes a byte, the
 * first one low; 2 bits: four; 3 bits: the low two bits of each code so (32 bytes), then the third bits, eight a byte
 * (16 bytes); 8 bits: the codes. scales, zeros: [outputs][groups], scales in fp16, bf16 or fp32, zeros uint8. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PLANES
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 128 };
enum { FP16, BF16, FP32 };

struct weight {
    const uint8_t *codes, *zeros;
    const void *scales;
    long kind, bits, inputs, outputs, group, groups, chunks, unit;
};

/* unit: the largest of 128, 64, 32 that divides a group; a chunk has 128 / unit scales. */
static struct weight weight_of(const uint8_t *codes, const void *scales, const uint8_t *zeros, long kind, long bits,
                               long inputs, long outputs, long group) {
    const long unit = group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
    return (struct weight){codes,   zeros, scales, kind, bits, inputs, outputs, group, (inputs + group - 1) / group,
                           (inputs + CHUNK - 1) / CHUNK, unit};
}

INLINE __mmask16 left(long count) { return count >= 16 ? 0xffff : (__mmask16)((1 << count) - 1); }

/* Up to sixteen scales, or zeros, from place `at` on, as fp32; 0 where `mask` is. */
INLINE __m512 scales_at(const struct weight *w, long at, __mmask16 mask) {
    if (w->kind == FP32) return _mm512_maskz_loadu_ps(mask, (const float *)w->scales + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w->scales + at);
    if (w->kind == FP16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE __m512 zeros_at(const struct weight *w, long at, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w->zeros + at)));
}

INLINE __m256i load32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

INLINE __m512i wide_bits(const uint8_t *p) { /* sixteen bytes -> words, each byte's nibbles in the low bits of two */
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}
#endif
