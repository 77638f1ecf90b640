/* What a step needs beside products and attention: its batch, rows of the embedding, angles, norms, the gated activation,
 * and rotation with the write of keys and values. All compute in floats and round once, at the end.
 */
#include "common.h"
#include "team.h"

typedef struct {
    const int64_t *rows;       /* [count] lines of what follows; `padding` for none */
    const int64_t *last_token; /* [padding + 1] */
    int64_t *num_computed;     /* [padding + 1] */
    const int32_t *tables;     /* [groups, padding + 1, ...] block ids */
    int64_t *tokens, *positions, *next; /* [count] */
    int32_t *seq_lens;                  /* [count] */
    int64_t *slots;                     /* [groups, count], slots_stride apart */
    int64_t count, padding, groups, group_stride, row_stride, slots_stride, block_size;
} PrepareDecode;

/* Lays out a step of one token a row and advances num_computed by it: see reference_batch.prepare_decode. */
EXPORT int prepare_decode(Team *team, const void *arguments) {
    (void)team;
    const PrepareDecode *s = arguments;
#pragma omp single nowait
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t row = s->rows[i];
        const bool real = row != s->padding;
        const int64_t position = real ? s->num_computed[row] : 0, block = position / s->block_size;
        s->tokens[i] = real ? s->last_token[row] : 0;
        s->positions[i] = position;
        s->next[i] = position + 1;
        s->seq_lens[i] = (int32_t)(position + 1);
        for (int64_t group = 0; group < s->groups; group++) {
            const int64_t id = real ? s->tables[group * s->group_stride + row * s->row_stride + block] : 0;
            s->slots[group * s->slots_stride + i] = id * s->block_size + position % s->block_size;
        }
        if (real) s->num_computed[row] = position + 1;
    }
    return 0;
}

typedef struct {
    const int64_t *index; /* [count] */
    const char *table;    /* rows of `bytes` */
    char *out;            /* [count] of them */
    int64_t count, bytes;
} Gather;

EXPORT int gather(Team *team, const void *arguments) {
    (void)team;
    const Gather *g = arguments;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < g->count; i++)
        memcpy(g->out + i * g->bytes, g->table + g->index[i] * g->bytes, (size_t)g->bytes);
    return 0;
}

typedef struct {
    const int64_t *positions; /* [count] */
    const float *inv_freq;    /* [pairs], or [count, pairs] with stride = pairs instead of 0 */
    float *cos, *sin;         /* [count, 2 * pairs] */
    int64_t count, pairs, stride;
    float scale;
} Rotation;

/* Cosines twice, sines negated and then as they are: see Kernels.rotation. */
EXPORT int rotation(Team *team, const void *arguments) {
    (void)team;
    const Rotation *r = arguments;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < r->count; i++) {
        float *cos = r->cos + i * 2 * r->pairs, *sin = r->sin + i * 2 * r->pairs;
        for (int64_t j = 0; j < r->pairs; j++) {
            const float angle = (float)r->positions[i] * r->inv_freq[i * r->stride + j];
            const float x = cosf(angle) * r->scale, y = sinf(angle) * r->scale;
            cos[j] = cos[r->pairs + j] = x;
            sin[j] = -y;
            sin[r->pairs + j] = y;
        }
    }
    return 0;
}

typedef struct {
    const void *x, *residual; /* [rows, n]; residual may be NULL */
    void *total;              /* takes x + residual, of which y is the norm as it was rounded */
    const void *weight;       /* [n] */
    void *y;                  /* [rows, n] */
    int64_t rows, n;
    float eps;
    int32_t half;
} Norm;

INLINE void norm_rows(const Norm *a, bool half) {
    const long n = a->n;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < a->rows; row++) {
        const void *from = at(a->x, row * n, half);
        if (a->residual) {
            add_row(into(a->total, row * n, half), from, at(a->residual, row * n, half), n, half);
            from = at(a->total, row * n, half);
        }
        scale_row(into(a->y, row * n, half), half, from, a->weight, inverse_rms(from, n, a->eps, half), n, half);
    }
}

EXPORT int rms_norm(Team *team, const void *arguments) {
    (void)team;
    const Norm *norm = arguments;
    if (norm->half) norm_rows(norm, true);
    else norm_rows(norm, false);
    return 0;
}

typedef struct {
    const void *x; /* [rows, 2 n] */
    void *y;       /* [rows, n] */
    int64_t rows, n, half;
} Gate;

INLINE void silu_rows(const Gate *a, bool half) {
    const long n = a->n;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < a->rows; row++) {
        const void *gate = at(a->x, 2 * row * n, half);
        gate_row(into(a->y, row * n, half), half, gate, at(gate, n, half), n, half);
    }
}

EXPORT int silu_mul(Team *team, const void *arguments) {
    (void)team;
    const Gate *gate = arguments;
    if (gate->half) silu_rows(gate, true);
    else silu_rows(gate, false);
    return 0;
}

typedef struct {
    const void *qkv;                 /* tokens [heads + 2 * kv_heads, dim], `stride` elements apart */
    const float *cos, *sin;          /* [tokens, width] */
    const void *q_weight, *k_weight; /* [dim], or NULL for no norm */
    const int64_t *slots;            /* [tokens] */
    void *q, *k, *v;                 /* q [tokens, heads, dim]; caches [slots, kv_heads, dim] */
    int64_t tokens, stride, heads, kv_heads, dim, width;
    float eps;
    int32_t half, half_kv;
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

typedef void RotateHead(const Rope *r, void *to, const void *from, const void *weight, long token);
#define ROTATE(name, half_to, half)                                                                               \
    static void name(const Rope *r, void *to, const void *from, const void *weight, long token) {                \
        rotate_head(r, to, half_to, from, weight, token, half);                                                   \
    }
ROTATE(rotate_float, false, false)
ROTATE(rotate_half, true, true)
ROTATE(widen_rotated, false, true)
ROTATE(narrow_rotated, true, false)

static void copy_head(void *to, bool half_to, const void *from, bool half, long dim) {
    if (half == half_to) memcpy(to, from, (size_t)dim * (half ? 2 : 4));
    else if (half) widen_row(to, from, dim);
    else
        for (long i = 0; i < dim; i++) put_one(to, i, get_one(from, i, false), true);
}

EXPORT int rope_norm_write_kv(Team *team, const void *arguments) {
    (void)team;
    const Rope *r = arguments;
    const bool half = r->half, half_kv = r->half_kv;
    RotateHead *const rotate_q = half ? rotate_half : rotate_float;
    RotateHead *const rotate_k = half == half_kv ? rotate_q : half ? widen_rotated : narrow_rotated;
#pragma omp for schedule(static) nowait
    for (long t = 0; t < r->tokens; t++) {
        const void *from = at(r->qkv, t * r->stride, half);
        for (long head = 0; head < r->heads; head++)
            rotate_q(r, into(r->q, (t * r->heads + head) * r->dim, half), at(from, head * r->dim, half), r->q_weight, t);
        for (long head = 0; head < r->kv_heads; head++) {
            const void *k = at(from, (r->heads + head) * r->dim, half), *v = at(k, r->kv_heads * r->dim, half);
            const long to = (r->slots[t] * r->kv_heads + head) * r->dim;
            rotate_k(r, into(r->k, to, half_kv), k, r->k_weight, t);
            copy_head(into(r->v, to, half_kv), half_kv, v, half, r->dim);
        }
    }
    return 0;
}
