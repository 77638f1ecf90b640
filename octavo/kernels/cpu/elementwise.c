/* Norms, the gated activation, and rotation with the write of keys and values: one call an operation.
 *
 * All compute in floats and round once, at the end. Small batches stay on the calling thread.
 */
#include "common.h"

#define SERIAL 32768 /* elements that are done before other threads have woken up */

INLINE void norm_rows(const void *x, const void *residual, void *total, const void *weight, void *y, long rows, long n,
                      float eps, bool half) {
#pragma omp parallel for schedule(static) if (rows * n > SERIAL)
    for (long row = 0; row < rows; row++) {
        const void *from = at(x, row * n, half);
        if (residual) {
            add_row(into(total, row * n, half), from, at(residual, row * n, half), n, half);
            from = at(total, row * n, half);
        }
        scale_row(into(y, row * n, half), half, from, weight, inverse_rms(from, n, eps, half), n, half);
    }
}

/* With `residual`, total = x + residual and y is the norm of total as it was rounded; all rows are n apart. */
EXPORT void rms_norm(const void *x, const void *residual, void *total, const void *weight, void *y, long rows, long n,
                     float eps, int half) {
    if (half) norm_rows(x, residual, total, weight, y, rows, n, eps, true);
    else norm_rows(x, residual, total, weight, y, rows, n, eps, false);
}

INLINE void silu_rows(const void *x, void *y, long rows, long n, bool half) {
#pragma omp parallel for schedule(static) if (rows * n > SERIAL / 2)
    for (long row = 0; row < rows; row++) {
        const void *gate = at(x, 2 * row * n, half);
        gate_row(into(y, row * n, half), half, gate, at(gate, n, half), n, half);
    }
}

/* x [rows, 2 n] -> y [rows, n] */
EXPORT void silu_mul(const void *x, void *y, long rows, long n, int half) {
    if (half) silu_rows(x, y, rows, n, true);
    else silu_rows(x, y, rows, n, false);
}

typedef struct {
    const void *qkv, *q_weight, *k_weight;
    const float *cos, *sin;
    const int64_t *slots;
    void *q, *k, *v;
    long tokens, stride, heads, kv_heads, dim, width;
    float eps;
} Rope;

/* y = x * cos + swapped(x) * sin over the first `width` dimensions, x times scale * weight before. */
INLINE void rotate_head(const Rope *r, void *to, bool half_to, const void *from, const void *weight, long token, bool half) {
    const long dim = r->dim, pairs = r->width / 2;
    const float *cos = r->cos + token * r->width, *sin = r->sin + token * r->width;
    float scale = weight ? inverse_rms(from, dim, r->eps, half) : 1.0f;
    long i = 0;
    for (; i + VL <= pairs; i += VL) {
        vf a = get(from, i, half), b = get(from, pairs + i, half);
        if (weight) {
            a *= scale * get(weight, i, half);
            b *= scale * get(weight, pairs + i, half);
        }
        put(to, i, a * load(cos + i) + b * load(sin + i), half_to);
        put(to, pairs + i, b * load(cos + pairs + i) + a * load(sin + pairs + i), half_to);
    }
    for (; i < pairs; i++) {
        float a = get_one(from, i, half), b = get_one(from, pairs + i, half);
        if (weight) {
            a *= scale * get_one(weight, i, half);
            b *= scale * get_one(weight, pairs + i, half);
        }
        put_one(to, i, a * cos[i] + b * sin[i], half_to);
        put_one(to, pairs + i, b * cos[pairs + i] + a * sin[pairs + i], half_to);
    }
    for (i = r->width; i < dim; i++)
        put_one(to, i, get_one(from, i, half) * (weight ? scale * get_one(weight, i, half) : 1.0f), half_to);
}

INLINE void copy_head(void *to, bool half_to, const void *from, bool half, long dim) {
    if (half == half_to) memcpy(to, from, (size_t)dim * (half ? 2 : 4));
    else
        for (long i = 0; i < dim; i++) put_one(to, i, get_one(from, i, half), half_to);
}

INLINE void rope_tokens(const Rope *r, bool half, bool half_kv) {
#pragma omp parallel for schedule(static) if (r->tokens * (r->heads + 2 * r->kv_heads) * r->dim > SERIAL)
    for (long t = 0; t < r->tokens; t++) {
        const void *from = at(r->qkv, t * r->stride, half);
        for (long head = 0; head < r->heads; head++)
            rotate_head(r, into(r->q, (t * r->heads + head) * r->dim, half), half, at(from, head * r->dim, half),
                        r->q_weight, t, half);
        for (long head = 0; head < r->kv_heads; head++) {
            const void *k = at(from, (r->heads + head) * r->dim, half), *v = at(k, r->kv_heads * r->dim, half);
            long to = (r->slots[t] * r->kv_heads + head) * r->dim;
            rotate_head(r, into(r->k, to, half_kv), half_kv, k, r->k_weight, t, half);
            copy_head(into(r->v, to, half_kv), half_kv, v, half, r->dim);
        }
    }
}

/* qkv: tokens [heads + 2 * kv_heads, dim], `stride` elements apart; cos, sin [tokens, width]; weights NULL: no norm. */
EXPORT void rope_norm_write_kv(const void *qkv, const float *cos, const float *sin, const void *q_weight,
                               const void *k_weight, const int64_t *slots, void *q, void *k, void *v, long tokens,
                               long stride, long heads, long kv_heads, long dim, long width, float eps, int half,
                               int half_kv) {
    const Rope rope = {qkv, q_weight, k_weight, cos, sin, slots, q, k, v, tokens, stride, heads, kv_heads, dim, width, eps};
    if (half && half_kv) rope_tokens(&rope, true, true);
    else if (half) rope_tokens(&rope, true, false);
    else if (half_kv) rope_tokens(&rope, false, true);
    else rope_tokens(&rope, false, false);
}
