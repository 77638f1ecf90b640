/* Vector operations that the products of quantized weights are made of, one set per instruction set.

   A set works on LANES output rows at a time, VECS * LANES = 16:
     codes   4 unsigned codes of each row (columns 4k..4k+3), a byte each
     sums    running sums of products; what they count in depends on `bits`, `widen` makes them 32-bit integers
     ints    a 32-bit integer per row
     floats  a float per row
   `run(bits)` is the number of `dot`s after which sums must be widened, 8 where they cannot overflow.
   `bits` is a constant at every call. */

#ifndef OCTAVO_QUANT_SIMD_H
#define OCTAVO_QUANT_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int32_t load_int(const void *p) {
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* The exponent's bias moves by a multiplication, which subnormal numbers survive. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include "x86.h"

#define VECS 1
#define WIDE_X 0
#define SIGNED_BYTES 0
typedef __m512i codes, sums, ints;
typedef __m512 floats;

INLINE codes load_codes(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE codes low_nibbles(codes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE codes high_nibbles(codes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
INLINE codes add_high(codes low, codes v, const int quad) { /* bits 2 quad and 2 quad + 1 of v become bits 4 and 5 */
    v = quad < 2 ? _mm512_slli_epi16(v, 4 - 2 * quad) : _mm512_srli_epi16(v, 2 * quad - 4);
    return _mm512_or_si512(low, _mm512_and_si512(v, _mm512_set1_epi8(0x30)));
}
INLINE int run(const int bits) { return (void)bits, 8; }
INLINE sums no_sums(void) { return _mm512_setzero_si512(); }
INLINE sums dot(const int bits, sums s, codes w, const int8_t *x) {
    (void)bits;
    return _mm512_dpbusd_epi32(s, w, _mm512_set1_epi32(load_int(x)));
}
INLINE ints widen(const int bits, sums s) { return (void)bits, s; }
INLINE ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
INLINE ints add_ints(ints a, ints b) { return _mm512_add_epi32(a, b); }
INLINE ints sub_ints(ints a, ints b) { return _mm512_sub_epi32(a, b); }
INLINE floats all_floats(float value) { return _mm512_set1_ps(value); }
INLINE floats to_floats(ints a) { return _mm512_cvtepi32_ps(a); }
INLINE floats multiply_floats(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats load_halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, floats a) { _mm512_storeu_ps(p, a); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "x86.h"

#define VECS 2
#define SIGNED_BYTES 0
typedef __m256i codes, sums, ints;
typedef __m256 floats;

INLINE codes load_codes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE codes low_nibbles(codes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE codes high_nibbles(codes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
INLINE codes add_high(codes low, codes v, const int quad) {
    v = quad < 2 ? _mm256_slli_epi16(v, 4 - 2 * quad) : _mm256_srli_epi16(v, 2 * quad - 4);
    return _mm256_or_si256(low, _mm256_and_si256(v, _mm256_set1_epi8(0x30)));
}
INLINE sums no_sums(void) { return _mm256_setzero_si256(); }
INLINE __m256i spread(const int8_t *x) { return _mm256_set1_epi32(load_int(x)); }
INLINE ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
INLINE ints add_ints(ints a, ints b) { return _mm256_add_epi32(a, b); }
INLINE ints sub_ints(ints a, ints b) { return _mm256_sub_epi32(a, b); }
INLINE floats all_floats(float value) { return _mm256_set1_ps(value); }
INLINE floats to_floats(ints a) { return _mm256_cvtepi32_ps(a); }
INLINE floats multiply_floats(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats load_halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE floats load_floats(const float *p) { return _mm256_load_ps(p); }
INLINE void store_floats(float *p, floats a) { _mm256_store_ps(p, a); }

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define WIDE_X 0
INLINE int run(const int bits) { return (void)bits, 8; }
INLINE ints widen(const int bits, sums s) { return (void)bits, s; }
INLINE sums dot(const int bits, sums s, codes w, const int8_t *x) {
    (void)bits;
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(s, w, spread(x));
#else
    return _mm256_dpbusd_epi32(s, w, spread(x));
#endif
}
#else
/* Pairs of products sum in 16 bits: 16 of them at 15 * 127 each fit, 4 at 63 * 127. With codes of 8 bits not even two
   do: there codes and x are 16 bits wide, x in the order 0 2 1 3, and sums are of 32 bits, at half the speed. The empty
   asm keeps the compiler from adding up later, which takes more registers than there are. */
#define WIDE_X 1
INLINE int run(const int bits) { return bits == 6 ? 2 : 8; }
INLINE ints widen(const int bits, sums s) { return bits == 8 ? s : _mm256_madd_epi16(s, _mm256_set1_epi16(1)); }
INLINE sums dot(const int bits, sums s, codes w, const int8_t *x) {
    if (bits == 8) {
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), spread(x)));
        __asm__("" : "+x"(s));
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), spread(x + 4)));
    } else
        s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w, spread(x)));
    __asm__("" : "+x"(s));
    return s;
}
#endif

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#define VECS 4
#define WIDE_X 0
#define SIGNED_BYTES 1 /* the instruction multiplies signed bytes: 8-bit codes lose their 128 when read */
typedef uint8x16_t codes;
typedef int32x4_t sums, ints;
typedef float32x4_t floats;

INLINE codes load_codes(const uint8_t *p) { return vld1q_u8(p); }
INLINE codes low_nibbles(codes v) { return vandq_u8(v, vdupq_n_u8(15)); }
INLINE codes high_nibbles(codes v) { return vshrq_n_u8(v, 4); }
INLINE codes add_high(codes low, codes v, const int quad) {
    return vorrq_u8(low, vandq_u8(vshlq_u8(v, vdupq_n_s8((int8_t)(4 - 2 * quad))), vdupq_n_u8(0x30)));
}
INLINE int run(const int bits) { return (void)bits, 8; }
INLINE sums no_sums(void) { return vdupq_n_s32(0); }
INLINE sums dot(const int bits, sums s, codes w, const int8_t *x) {
    if (bits == 8) w = veorq_u8(w, vdupq_n_u8(128));
    return vdotq_s32(s, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(vdupq_n_s32(load_int(x))));
}
INLINE ints widen(const int bits, sums s) { return (void)bits, s; }
INLINE ints all_ints(int32_t value) { return vdupq_n_s32(value); }
INLINE ints add_ints(ints a, ints b) { return vaddq_s32(a, b); }
INLINE ints sub_ints(ints a, ints b) { return vsubq_s32(a, b); }
INLINE floats all_floats(float value) { return vdupq_n_f32(value); }
INLINE floats to_floats(ints a) { return vcvtq_f32_s32(a); }
INLINE floats multiply_floats(floats a, floats b) { return vmulq_f32(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE floats load_halves(const uint8_t *p) {
    uint16x4_t bits;
    memcpy(&bits, p, 8);
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}
INLINE floats load_floats(const float *p) { return vld1q_f32(p); }
INLINE void store_floats(float *p, floats a) { vst1q_f32(p, a); }

#else /* vectors of the compiler's own */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed format is little-endian"
#endif
#define UNROLL

#define VECS 4
#define WIDE_X 0
#define SIGNED_BYTES 0
typedef uint8_t codes __attribute__((vector_size(16)));
typedef int32_t sums __attribute__((vector_size(16)));
typedef sums ints;
typedef float floats __attribute__((vector_size(16)));

INLINE codes load_codes(const uint8_t *p) {
    codes v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE codes low_nibbles(codes v) { return v & 15; }
INLINE codes high_nibbles(codes v) { return v >> 4; }
INLINE codes add_high(codes low, codes v, const int quad) { return low | ((v >> (2 * quad) & 3) << 4); }
INLINE int run(const int bits) { return (void)bits, 8; }
INLINE sums no_sums(void) { return (sums){0}; }
INLINE sums dot(const int bits, sums s, codes w, const int8_t *x) {
    (void)bits;
    const sums words = (sums)w; /* a row's four codes, the first in the low byte */
    return s + (words & 255) * x[0] + (words >> 8 & 255) * x[1] + (words >> 16 & 255) * x[2] + (words >> 24 & 255) * x[3];
}
INLINE ints widen(const int bits, sums s) { return (void)bits, s; }
INLINE ints all_ints(int32_t value) { return (ints){value, value, value, value}; }
INLINE ints add_ints(ints a, ints b) { return a + b; }
INLINE ints sub_ints(ints a, ints b) { return a - b; }
INLINE floats all_floats(float value) { return (floats){value, value, value, value}; }
INLINE floats to_floats(ints a) { return (floats){a[0], a[1], a[2], a[3]}; }
INLINE floats multiply_floats(floats a, floats b) { return a * b; }
INLINE floats multiply_add(floats a, floats b, floats c) { return a * b + c; }
INLINE floats load_halves(const uint8_t *p) {
    uint16_t bits[4];
    memcpy(bits, p, 8);
    return (floats){half_to_float(bits[0]), half_to_float(bits[1]), half_to_float(bits[2]), half_to_float(bits[3])};
}
INLINE floats load_floats(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_floats(float *p, floats a) { memcpy(p, &a, sizeof a); }

#endif

#define LANES (16 / VECS)
#define MAX_ROWS 6 /* that share the reading of a block */
#if !defined(UNROLL) && defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif !defined(UNROLL)
#define UNROLL _Pragma("GCC unroll 16")
#endif

#endif
