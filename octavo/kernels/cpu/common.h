/* What the float kernels share: a vector of floats as wide as the target has, bfloat16, exp, and the size of a register
 * tile of dot products, which linear layers and attention are made of.
 *
 * Vector arithmetic is GCC's and Clang's vector extension, so that every target compiles; intrinsics serve where the
 * extension has no word for something, each beside a plain loop.
 */
#ifndef OCTAVO_COMMON_H
#define OCTAVO_COMMON_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include "x86.h"
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define VL 16 /* floats in a vector */
#define TOKENS 6 /* columns of a tile: 4 x TOKENS accumulators stay in registers */
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#define TOKENS 3
#elif defined(__aarch64__)
#define VL 4
#define TOKENS 6
#else
#define VL 4
#define TOKENS 2
#endif
#define ROWS 4 /* rows of a tile */

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_mem __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t bf16;

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf load(const float *p) { return *(const vf_mem *)p; }
INLINE void store(float *p, vf x) { *(vf_mem *)p = x; }

/* The first n < VL floats at p, then zeros. */
INLINE vf load_some(const float *p, long n) {
    vf x = {0};
    memcpy(&x, p, (size_t)n * 4);
    return x;
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* b where one of them is NaN. */
INLINE vf larger(vf a, vf b) {
#if VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float sum_of(vf x) {
    float total = 0;
    UNROLL for (int i = 0; i < VL; i++) total += x[i];
    return total;
}

INLINE float largest_of(vf x) {
    float top = x[0];
    UNROLL for (int i = 1; i < VL; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* sums[i] = the sum of x[i]'s lanes, for ROWS vectors. */
INLINE void sums_of(const vf x[ROWS], float *sums) {
#if defined(__x86_64__)
    __m128 part[ROWS];
    for (int i = 0; i < ROWS; i++) {
#if VL == 16
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), _mm512_extractf32x8_ps((__m512)x[i], 1));
        part[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif VL == 8
        part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)x[i]), _mm256_extractf128_ps((__m256)x[i], 1));
#else
        part[i] = (__m128)x[i];
#endif
    }
    _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(part[0], part[1]), _mm_add_ps(part[2], part[3])));
#elif defined(__aarch64__)
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]),
                               vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3])));
#else
    for (int i = 0; i < ROWS; i++) sums[i] = sum_of(x[i]);
#endif
}

/* bfloat16 */

INLINE float widen_one(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE vf widen(const bf16 *p) {
#if VL == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif VL == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif defined(__x86_64__)
    return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p));
#elif defined(__aarch64__)
    return (vf)vshll_n_u16(vld1_u16(p), 16);
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = widen_one(p[i]);
    return x;
#endif
}

INLINE vf widen_some(const bf16 *p, long n) {
    bf16 padded[VL] = {0};
    memcpy(padded, p, (size_t)n * 2);
    return widen(padded);
}

/* Rounds to the nearest, ties to even; NaN stays NaN. */
INLINE bf16 narrow_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void narrow(bf16 *p, vf x) {
    vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vi nan = x != x;
    vu result = (rounded & ~(vu)nan) | ((bits >> 16 | 0x40) & (vu)nan);
#if VL == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)result));
#elif VL == 8
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)result, (__m256i)result), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
#else
    for (int i = 0; i < VL; i++) p[i] = (bf16)result[i];
#endif
}

/* Floats or bfloat16 by `half`, a constant wherever these are called from a loop that matters. */

INLINE const void *at(const void *p, long i, bool half) { return (const char *)p + i * (half ? 2 : 4); }
INLINE void *into(void *p, long i, bool half) { return (char *)p + i * (half ? 2 : 4); }
INLINE vf get(const void *p, long i, bool half) {
    return half ? widen((const bf16 *)p + i) : load((const float *)p + i);
}
INLINE vf get_some(const void *p, long i, long n, bool half) {
    return half ? widen_some((const bf16 *)p + i, n) : load_some((const float *)p + i, n);
}
INLINE float get_one(const void *p, long i, bool half) {
    return half ? widen_one(((const bf16 *)p)[i]) : ((const float *)p)[i];
}
INLINE void put(void *p, long i, vf x, bool half) {
    if (half) narrow((bf16 *)p + i, x);
    else store((float *)p + i, x);
}
INLINE void put_one(void *p, long i, float x, bool half) {
    if (half) ((bf16 *)p)[i] = narrow_one(x);
    else ((float *)p)[i] = x;
}
INLINE void put_some(void *p, long i, vf x, long n, bool half) {
    for (long j = 0; j < n; j++) put_one(p, i + j, x[j], half);
}

INLINE void widen_row(float *into, const bf16 *from, long n) {
    long i = 0;
    for (; i + VL <= n; i += VL) store(into + i, widen(from + i));
    for (; i < n; i++) into[i] = widen_one(from[i]);
}

/* exp(x), within 2 units in the last place; 0 below e**-87.3, infinity above e**88.3; NaN stays NaN.
 * x = n ln 2 + r, |r| <= ln 2 / 2, and a Taylor polynomial of degree 7 in r.
 */
INLINE vf exp_of(vf x) {
    const float lowest = -87.3f, highest = 88.3f, magic = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    vi small = x < lowest, large = x > highest;
    vf y = choose(large, splat(highest), choose(small, splat(lowest), x));
    vf shifted = y * 1.44269504f + magic, n = shifted - magic;
    vf r = y - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf scale = (vf)(((vi)shifted - (vi)splat(magic) + 127) << 23);
    return (vf)((vi)choose(large, splat(INFINITY), p * scale) & ~small);
}

/* Rows that layers pass on */

INLINE float inverse_rms(const void *x, long n, float eps, bool half) {
    vf total[2] = {{0}};
    long i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vf a = get(x, i, half), b = get(x, i + VL, half);
        total[0] += a * a;
        total[1] += b * b;
    }
    float sum = sum_of(total[0] + total[1]);
    for (; i < n; i++) sum += get_one(x, i, half) * get_one(x, i, half);
    return 1.0f / sqrtf(sum / (float)n + eps);
}

/* y = x * scale * weight; x and weight of one type. */
INLINE void scale_row(void *y, bool half_y, const void *x, const void *weight, float scale, long n, bool half) {
    long i = 0;
    for (; i + VL <= n; i += VL) put(y, i, get(x, i, half) * scale * get(weight, i, half), half_y);
    for (; i < n; i++) put_one(y, i, get_one(x, i, half) * scale * get_one(weight, i, half), half_y);
}

INLINE void add_row(void *sum, const void *x, const void *residual, long n, bool half) {
    long i = 0;
    for (; i + VL <= n; i += VL) put(sum, i, get(x, i, half) + get(residual, i, half), half);
    for (; i < n; i++) put_one(sum, i, get_one(x, i, half) + get_one(residual, i, half), half);
}

/* y = silu(gate) * up */
INLINE void gate_row(void *y, bool half_y, const void *gate, const void *up, long n, bool half) {
    for (long i = 0; i < n; i += VL) {
        const long count = n - i < VL ? n - i : VL;
        vf g = count == VL ? get(gate, i, half) : get_some(gate, i, count, half);
        vf u = count == VL ? get(up, i, half) : get_some(up, i, count, half);
        vf gated = g / (1.0f + exp_of(-g)) * u;
        if (count == VL) put(y, i, gated, half_y);
        else put_some(y, i, gated, count, half_y);
    }
}

/* Memory of a call. Up to KEPT bytes stay the thread's for the next call; `give_back` frees more. NULL: none left. */
#define KEPT (4L << 20)

static inline void *borrow(long bytes) {
    static _Thread_local void *memory;
    static _Thread_local long size;
    if (bytes > KEPT) return malloc((size_t)bytes);
    if (size < bytes) {
        free(memory);
        memory = malloc((size_t)bytes);
        size = memory ? bytes : 0;
    }
    return memory;
}

static inline void give_back(void *memory, long bytes) {
    if (bytes > KEPT) free(memory);
}

#endif
