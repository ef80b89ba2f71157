/* Dequantize a tile of torch's packed int4 weight: native.py compiles this, cpu.py calls it.
 *
 *     out[k][n] = (code[k][n] - zero[k / group][n]) * scale[k / group][n]
 *
 * packed: blocks of `block` outputs, [tile / block][inputs][block / 2] bytes; a byte holds output j in its low nibble and
 * output j + block / 2 in its high one. high: the upper nibbles of 8-bit codes in the same layout, or NULL.
 * scale, zero: [groups][tile]. out: [inputs][tile], bf16 rounded to nearest even, or fp32. */
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

DEQUANTIZE(dequantize_bf16, uint16_t, to_bf16)
DEQUANTIZE(dequantize_fp32, float, to_fp32)
