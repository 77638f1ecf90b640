/* Products with quantized weights: y = x W^T + bias, where W stays packed and x becomes integers on the way in.

   A matrix [out, in] is stored in panels of 16 rows, a panel in blocks of 32 columns:
     codes       4 bits: 256 bytes; vector i (64 bytes: 16 rows of 4 columns) has columns 4i.. in its low nibbles and
                 16 + 4i.. in its high ones
                 6 bits: the same for the low 4 bits, then 128 bytes: byte j of half h has the high 2 bits of the bytes j
                 of vectors 0..3 of columns 16h.., lowest first
                 8 bits: 512 bytes, vector i has columns 4i..
     scales      16 float16 of the rows; with groups of 16, those of columns 0..15, then 16..31
     minima      16 float16, in formats that have them
   A weight is scale * (code - zero), or scale * code + minimum. The last panel is padded with zeros.

   Each block of 32 activations of a row becomes d * (q + r / 128), d = max |x| / 127, q and r integers of 8 bits, so that
   the product of a block is exact integer arithmetic, scaled once: d * scale * (sum(code * q) - zero * sum(q)) + minimum *
   d * sum(q). The remainder r counts only in blocks with a value that is OUTLIER times the root mean square of its row:
   there d is coarse for all others, and such a block's error is most of the row's. In language models that is a hundredth
   of the blocks, so the remainders, which are multiplied like further rows of x, cost nothing.

   A residual addition and RMSNorm may come before, SwiGLU after. */

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "quant_simd.h"
#include "team.h"

#define COLUMNS 32
#define PANEL 16
#define OUTLIER 14
#define AHEAD 1024   /* bytes of weights that are prefetched */
#define ROW_BLOCK 64 /* rows of x that share a pass over a panel, which stays in the cache */

enum { FLOAT32, BFLOAT16 };

struct format {
    int bits, group, zero, has_min;
};

static const struct format formats[] = {
    {4, 32, 8, 0}, {4, 32, 0, 1}, {6, 32, 16, 0}, {6, 32, 0, 1}, {6, 16, 32, 0}, {8, 32, 128, 0},
};

struct record { /* of a block of a row of x: d, d * sum(q), and zero * sum(q) over all columns and over the first 16 */
    float d, sum;
    int32_t zeros, low_zeros;
    int8_t q[]; /* 32; where WIDE_X those of codes of 8 bits are int16: 128 * q + r */
};

struct product { /* everything of floats is of `type`; mirrored in quant_linear.py */
    const void *x; /* contiguous, as residual and stream are */
    const uint8_t *weight;
    const void *bias;            /* or NULL */
    void *out;                   /* rows `stride` elements apart */
    const void *norm, *residual; /* or NULL: RMSNorm's weight; what is added before it */
    void *stream;                /* takes x + residual */
    int64_t type, rows, columns, format, outs, stride;
    float eps;
    int32_t gated; /* silu(first half of the outputs) * the second half; the halves end with a panel */
};

INLINE long block_bytes(const int bits, const int group, const int has_min) {
    return 64 * bits + PANEL * 2 * (COLUMNS / group + has_min);
}

INLINE float load_value(const void *p, const long type, long i) {
    if (type == BFLOAT16) return from_bits((uint32_t)((const uint16_t *)p)[i] << 16);
    return ((const float *)p)[i];
}

INLINE void store_value(void *p, const long type, long i, float value) {
    if (type == BFLOAT16) {
        const uint32_t bits = to_bits(value);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        ((uint16_t *)p)[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
    } else
        ((float *)p)[i] = value;
}

/* Values i.. to or from floats; the loops are apart so that each is vectorised. */
static void load_values(const void *p, long type, long i, long count, float *into) {
    if (type == BFLOAT16)
        for (long j = 0; j < count; j++) into[j] = load_value(p, BFLOAT16, i + j);
    else
        memcpy(into, (const float *)p + i, (size_t)count * sizeof *into);
}

static void store_values(void *p, long type, long i, long count, const float *from) {
    if (type == BFLOAT16)
        for (long j = 0; j < count; j++) store_value(p, BFLOAT16, i + j, from[j]);
    else
        memcpy((float *)p + i, from, (size_t)count * sizeof *from);
}

/* x as the products take it. Of each ROW_BLOCK rows and 32 columns: `planes` times `rows` records, q and then r (none where
   WIDE_X), and ROW_BLOCK flags, whether r counts. */
struct activations {
    char *records;
    uint8_t *flags;
    long blocks, rows, width, planes, size; /* of a record */
};

INLINE struct record *record_of(const struct activations *x, long block, long plane, long row) {
    return (struct record *)(x->records + ((block * x->planes + plane) * x->rows + row) * x->size);
}

INLINE void fill(struct record *record, float d, const int16_t *q, long width, int zero) {
    int32_t low = 0, high = 0;
    for (int i = 0; i < COLUMNS / 2; i++) low += q[i], high += q[i + COLUMNS / 2];
    record->d = d;
    record->sum = d * (float)(low + high);
    record->zeros = zero * (low + high), record->low_zeros = zero * low;
    if (width == 2) {
        int16_t ordered[COLUMNS];
        for (int i = 0; i < COLUMNS; i += 4) {
            ordered[i] = q[i], ordered[i + 1] = q[i + 2];
            ordered[i + 2] = q[i + 1], ordered[i + 3] = q[i + 3];
        }
        memcpy(record->q, ordered, sizeof ordered);
    } else
        for (int i = 0; i < COLUMNS; i++) record->q[i] = (int8_t)q[i];
}

/* Columns 32 b.. of a row. r counts if a square is above `limit`. The sum with 1.5 * 2^23 leaves the nearest integer, ties
   to even, in the lowest bits. */
static void quantize(const float *values, const struct activations *x, long row, long b, int zero, float limit) {
    const long block = row / ROW_BLOCK * x->blocks + b, of = row % ROW_BLOCK;
    uint32_t top = 0;
    for (int i = 0; i < COLUMNS; i++) {
        const uint32_t magnitude = to_bits(values[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    const float most = from_bits(top), d = most / 127, inverse = most < 1e-30f ? 0 : 127 * 128 / most;
    int16_t both[COLUMNS], q[COLUMNS], r[COLUMNS];
    for (int i = 0; i < COLUMNS; i++)
        both[i] = (int16_t)(to_bits(values[i] * inverse + 12582912.0f) - to_bits(12582912.0f));
    if (x->planes == 1) {
        fill(record_of(x, block, 0, of), d / 128, both, x->width, zero);
        x->flags[block * ROW_BLOCK + of] = 0;
        return;
    }
    for (int i = 0; i < COLUMNS; i++) {
        q[i] = (int16_t)((both[i] + 64) >> 7);
        r[i] = (int16_t)(both[i] - 128 * q[i]);
    }
    fill(record_of(x, block, 0, of), d, q, 1, zero);
    const bool counts = most * most > limit;
    if (counts) fill(record_of(x, block, 1, of), d / 128, r, 1, zero);
    x->flags[block * ROW_BLOCK + of] = counts;
}

INLINE codes fetch(const int bits, const uint8_t *block, const int quad, const int v) {
    const int at = v * 4 * LANES;
    if (bits == 8) return load_codes(block + 64 * quad + at);
    const codes both = load_codes(block + 64 * (quad & 3) + at);
    const codes low = quad < 4 ? low_nibbles(both) : high_nibbles(both);
    return bits == 4 ? low : add_high(low, load_codes(block + 256 + 64 * (quad >> 2) + at), quad & 3);
}

struct numbers { /* of a block of weights, as floats */
    float scales[2][PANEL], minima[PANEL];
} __attribute__((aligned(64)));

INLINE void widen_numbers(const int bits, const int group, const int has_min, const uint8_t *block, struct numbers *to) {
    const uint8_t *at = block + 64 * bits;
    UNROLL for (int v = 0; v < VECS; v++) {
        store_floats(to->scales[0] + v * LANES, load_halves(at + 2 * v * LANES));
        if (group == 16) store_floats(to->scales[1] + v * LANES, load_halves(at + 2 * (PANEL + v * LANES)));
        if (has_min) store_floats(to->minima + v * LANES, load_halves(at + 2 * (PANEL + v * LANES)));
    }
}

/* The record `m` places on. */
INLINE const struct record *after(const int bits, const struct record *x, const long m) {
    const long size = (long)sizeof *x + COLUMNS * (bits == 8 && WIDE_X ? 2 : 1);
    return (const struct record *)((const char *)x + m * size);
}

/* total[m] += a block times the record x + m, for each of `rows`. */
INLINE void multiply(const int bits, const int group, const int has_min, const int rows, const uint8_t *block,
                     const struct numbers *numbers, const struct record *x, floats total[][VECS]) {
    const int width = bits == 8 && WIDE_X ? 2 : 1, quads = group / 4, signed_codes = bits == 8 && SIGNED_BYTES;
    sums part[MAX_ROWS][VECS];
    ints whole[MAX_ROWS][VECS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)
        part[m][v] = no_sums(), whole[m][v] = all_ints(0);
    UNROLL for (int quad = 0; quad < COLUMNS / 4; quad++) {
        codes w[VECS];
        UNROLL for (int v = 0; v < VECS; v++) w[v] = fetch(bits, block, quad, v);
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)
            part[m][v] = dot(bits, part[m][v], w[v], after(bits, x, m)->q + 4 * quad * width);
        const int last = quad % quads == quads - 1;
        if (last || quad % run(bits) == run(bits) - 1)
            UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++) {
                whole[m][v] = add_ints(whole[m][v], widen(bits, part[m][v]));
                part[m][v] = no_sums();
            }
        if (!last) continue;
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++) {
            if (!has_min && !signed_codes) {
                ints zeros = all_ints(group == 32 ? after(bits, x, m)->zeros : after(bits, x, m)->low_zeros);
                if (quad >= quads) zeros = sub_ints(all_ints(after(bits, x, m)->zeros), zeros);
                whole[m][v] = sub_ints(whole[m][v], zeros);
            }
            const floats scale = load_floats(numbers->scales[quad / quads] + v * LANES);
            total[m][v] = multiply_add(multiply_floats(scale, all_floats(after(bits, x, m)->d)), to_floats(whole[m][v]), total[m][v]);
            whole[m][v] = all_ints(0);
            if (has_min)
                total[m][v] = multiply_add(load_floats(numbers->minima + v * LANES), all_floats(after(bits, x, m)->sum), total[m][v]);
        }
    }
}

typedef void block_function(const uint8_t *, const struct numbers *, const struct record *, float *);

/* to[m] += a block times the record x + m, 16 floats each. A function for each number of rows: in one function the compiler
   would share work between them and run out of registers. */
#define BLOCK(name, bits, group, has_min, rows)                                                                       \
    static __attribute__((noinline)) void name##_##rows(const uint8_t *block, const struct numbers *numbers,         \
                                                        const struct record *x, float *to) {                          \
        floats total[rows][VECS];                                                                                     \
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)                                   \
            total[m][v] = load_floats(to + PANEL * m + v * LANES);                                                    \
        multiply(bits, group, has_min, rows, block, numbers, x, total);                                               \
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)                                   \
            store_floats(to + PANEL * m + v * LANES, total[m][v]);                                                    \
    }

/* to [count, 16] = a panel times `count` rows of x from the first of a ROW_BLOCK on; in each block, rows of which r counts
   come again. */
INLINE void multiply_rows(const int bits, const int group, const int has_min, block_function *const of[], const uint8_t *block,
                          const struct activations *x, long row_block, long count, float *to) {
    memset(to, 0, (size_t)count * PANEL * sizeof *to);
    for (long b = 0; b < x->blocks; b++, block += block_bytes(bits, group, has_min)) {
        const long from = row_block * x->blocks + b;
        const struct record *first = record_of(x, from, 0, 0);
        struct numbers numbers;
        for (int i = 0; i < block_bytes(bits, group, has_min); i += 64) __builtin_prefetch(block + AHEAD + i);
        widen_numbers(bits, group, has_min, block, &numbers);
        for (long m = 0; m < count;) {
            const long left = count - m, size = left == 8 ? 2 : left >= 6 ? 3 : left >= 4 ? 2 : left >= 2;
            of[size](block, &numbers, after(bits, first, m), to + PANEL * m);
            m += size == 3 ? 6 : 1 << size;
        }
        if (x->planes == 1) continue;
        for (long m = 0; m < count; m += 8) {
            uint64_t any;
            memcpy(&any, x->flags + from * ROW_BLOCK + m, sizeof any);
            for (long i = m; any && i < count && i < m + 8; i++)
                if (x->flags[from * ROW_BLOCK + i]) of[0](block, &numbers, record_of(x, from, 1, i), to + PANEL * i);
        }
    }
}

/* multiply_rows for one row, the same result. */
INLINE void multiply_row(const int bits, const int group, const int has_min, const uint8_t *block, const struct activations *x,
                         float *to) {
    floats total[1][VECS];
    UNROLL for (int v = 0; v < VECS; v++) total[0][v] = all_floats(0);
    for (long b = 0; b < x->blocks; b++, block += block_bytes(bits, group, has_min)) {
        struct numbers numbers;
        for (int i = 0; i < block_bytes(bits, group, has_min); i += 64) __builtin_prefetch(block + AHEAD + i);
        widen_numbers(bits, group, has_min, block, &numbers);
        multiply(bits, group, has_min, 1, block, &numbers, record_of(x, b, 0, 0), total);
        if (x->planes > 1 && x->flags[b * ROW_BLOCK])
            multiply(bits, group, has_min, 1, block, &numbers, record_of(x, b, 1, 0), total);
    }
    UNROLL for (int v = 0; v < VECS; v++) store_floats(to + v * LANES, total[0][v]);
}

typedef void panel_function(const uint8_t *, const struct activations *, long, long, float *);

#define MULTIPLIES(name, bits, group, has_min)                                                                        \
    BLOCK(name, bits, group, has_min, 1)                                                                              \
    BLOCK(name, bits, group, has_min, 2)                                                                              \
    BLOCK(name, bits, group, has_min, 4)                                                                              \
    BLOCK(name, bits, group, has_min, 6)                                                                              \
    static void name(const uint8_t *panel, const struct activations *x, long row_block, long count, float *to) {     \
        static block_function *const of[] = {name##_1, name##_2, name##_4, name##_6};                                 \
        if (x->rows == 1) multiply_row(bits, group, has_min, panel, x, to);                                           \
        else multiply_rows(bits, group, has_min, of, panel, x, row_block, count, to);                                 \
    }
/* A library may have the products of some formats only: bit i of FORMATS stands for formats[i]. */
#ifndef FORMATS
#define FORMATS 63
#endif
#if FORMATS >> 0 & 1
MULTIPLIES(q4, 4, 32, 0)
#else
#define q4 NULL
#endif
#if FORMATS >> 1 & 1
MULTIPLIES(q4_min, 4, 32, 1)
#else
#define q4_min NULL
#endif
#if FORMATS >> 2 & 1
MULTIPLIES(q6, 6, 32, 0)
#else
#define q6 NULL
#endif
#if FORMATS >> 3 & 1
MULTIPLIES(q6_min, 6, 32, 1)
#else
#define q6_min NULL
#endif
#if FORMATS >> 4 & 1
MULTIPLIES(q6_16, 6, 16, 0)
#else
#define q6_16 NULL
#endif
#if FORMATS >> 5 & 1
MULTIPLIES(q8, 8, 32, 0)
#else
#define q8 NULL
#endif

static panel_function *const multiplies[] = {q4, q4_min, q6, q6_min, q6_16, q8};

/* exp(x) = 2^n e^r, |r| <= ln 2 / 2, the latter by a polynomial: within 2 units in the last place from -87 to 88. */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    const float p = ((((r / 720 + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r * r + r + 1;
    return p * from_bits((to_bits(shifted) - to_bits(12582912.0f) + 127) << 23);
}

/* Outputs first.. of a row, up to 16: adds the bias, applies the gate and stores them. */
static void finish(const struct product *p, long row, long first, float *sums, float *up) {
    const long outs = p->gated ? p->outs / 2 : p->outs, count = outs - first < PANEL ? outs - first : PANEL;
    float bias[PANEL];
    if (p->bias) {
        load_values(p->bias, p->type, first, count, bias);
        for (long i = 0; i < count; i++) sums[i] += bias[i];
        if (p->gated) load_values(p->bias, p->type, outs + first, count, bias);
        for (long i = 0; i < count && p->gated; i++) up[i] += bias[i];
    }
    if (p->gated)
        for (int i = 0; i < PANEL; i++) sums[i] = sums[i] / (1 + exponential(-sums[i])) * up[i];
    store_values(p->out, p->type, row * p->stride + first, count, sums);
}

static void multiply_panel(const struct product *p, const struct activations *x, long row_block, long panel) {
    const struct format f = formats[p->format];
    const long first = row_block * ROW_BLOCK, count = p->rows - first < ROW_BLOCK ? p->rows - first : ROW_BLOCK;
    const long bytes = x->blocks * block_bytes(f.bits, f.group, f.has_min);
    const uint8_t *weight = p->weight + panel * bytes, *up = weight + p->outs / 2 / PANEL * bytes;
    float sums[ROW_BLOCK * PANEL] __attribute__((aligned(64))), ups[ROW_BLOCK * PANEL] __attribute__((aligned(64)));
    multiplies[p->format](weight, x, row_block, count, sums);
    if (p->gated) multiplies[p->format](up, x, row_block, count, ups);
    for (long m = 0; m < count; m++) finish(p, first + m, panel * PANEL, sums + PANEL * m, ups + PANEL * m);
}

/* A row of x becomes x + residual, in x's type, and then normalised integers. */
static void normalise(const struct product *p, const struct activations *x, long row) {
    const long blocks = x->blocks, at = row * p->columns;
    float values[COLUMNS], other[COLUMNS], squares[COLUMNS] = {0}, weighted[COLUMNS] = {0}, total = 0, energy = 0;
    for (long b = 0; b < blocks; b++) {
        load_values(p->x, p->type, at + b * COLUMNS, COLUMNS, values);
        if (p->residual) {
            load_values(p->residual, p->type, at + b * COLUMNS, COLUMNS, other);
            for (int i = 0; i < COLUMNS; i++) values[i] += other[i];
            store_values(p->stream, p->type, at + b * COLUMNS, COLUMNS, values);
            load_values(p->stream, p->type, at + b * COLUMNS, COLUMNS, values);
        }
        load_values(p->norm, p->type, b * COLUMNS, COLUMNS, other);
        for (int i = 0; i < COLUMNS; i++) {
            squares[i] += values[i] * values[i];
            weighted[i] += values[i] * other[i] * (values[i] * other[i]);
        }
    }
    for (int i = 0; i < COLUMNS; i++) total += squares[i], energy += weighted[i];
    const float scale = 1 / sqrtf(total / (float)p->columns + p->eps);
    const float limit = OUTLIER * OUTLIER * scale * scale * (energy / (float)p->columns);
    for (long b = 0; b < blocks; b++) {
        load_values(p->residual ? p->stream : p->x, p->type, at + b * COLUMNS, COLUMNS, values);
        load_values(p->norm, p->type, b * COLUMNS, COLUMNS, other);
        for (int i = 0; i < COLUMNS; i++) values[i] = values[i] * scale * other[i];
        quantize(values, x, row, b, formats[p->format].zero, limit);
    }
}

static float mean_square(const struct product *p, long row) {
    float values[COLUMNS], squares[COLUMNS] = {0}, total = 0;
    for (long i = 0; i < p->columns; i += COLUMNS) {
        load_values(p->x, p->type, row * p->columns + i, COLUMNS, values);
        for (int j = 0; j < COLUMNS; j++) squares[j] += values[j] * values[j];
    }
    for (int i = 0; i < COLUMNS; i++) total += squares[i];
    return total / (float)p->columns;
}

EXPORT int octavo_quant_linear(Team *team, const void *arguments) {
    const struct product *p = arguments;
    const long blocks = p->columns / COLUMNS, outs = p->gated ? p->outs / 2 : p->outs;
    const long panels = (outs + PANEL - 1) / PANEL, row_blocks = (p->rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const bool wide = WIDE_X && formats[p->format].bits == 8;
    struct activations x = {.blocks = blocks, .rows = p->rows < ROW_BLOCK ? p->rows : ROW_BLOCK};
    x.width = wide ? 2 : 1, x.planes = wide ? 1 : 2, x.size = (long)sizeof(struct record) + COLUMNS * x.width;
    const long flags = row_blocks * blocks * ROW_BLOCK;
    x.flags = team_memory(team, flags + row_blocks * blocks * x.planes * x.rows * x.size + 64);
    if (!x.flags) return 1;
    x.records = (char *)x.flags + flags;
    if (p->norm) {
#pragma omp for schedule(static)
        for (long row = 0; row < p->rows; row++) normalise(p, &x, row);
    } else {
        float limit = 0;
        long row = -1; /* that the limit is for */
#pragma omp for schedule(static)
        for (long i = 0; i < p->rows * blocks; i++) {
            float values[COLUMNS];
            if (row != i / blocks) row = i / blocks, limit = OUTLIER * OUTLIER * mean_square(p, row);
            load_values(p->x, p->type, i * COLUMNS, COLUMNS, values);
            quantize(values, &x, row, i % blocks, formats[p->format].zero, limit);
        }
    }
#pragma omp for schedule(static) collapse(2) nowait
    for (long r = 0; r < row_blocks; r++)
        for (long panel = 0; panel < panels; panel++) multiply_panel(p, &x, r, panel);
    return 0;
}

/* Whether codes of 8 bits are multiplied as 16-bit integers. */
EXPORT int octavo_quant_wide(void) { return WIDE_X; }

struct gather { /* mirrored in quant_linear.py */
    const uint8_t *weight;
    const int64_t *index; /* [count] rows of a packed matrix */
    void *out;            /* [count, columns] of `type` */
    int64_t format, columns, count, type;
};

EXPORT int octavo_quant_rows(Team *team, const void *arguments) {
    (void)team;
    const struct gather *g = arguments;
    const struct format f = formats[g->format];
    const long blocks = g->columns / COLUMNS, bytes = blocks * block_bytes(f.bits, f.group, f.has_min);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < g->count; i++) {
        const long lane = g->index[i] % PANEL;
        const uint8_t *block = g->weight + g->index[i] / PANEL * bytes;
        for (long b = 0; b < blocks; b++, block += bytes / blocks)
            for (int column = 0; column < COLUMNS; column++) {
                const int quad = column / 4, at = (int)lane * 4 + column % 4;
                const uint8_t *scale = block + 64 * f.bits + 2 * (PANEL * (column / f.group) + lane);
                int code = block[64 * (f.bits == 8 ? quad : quad & 3) + at];
                if (f.bits != 8) code = quad < 4 ? code & 15 : code >> 4;
                if (f.bits == 6) code |= (block[256 + 64 * (quad >> 2) + at] >> 2 * (quad & 3) & 3) << 4;
                uint16_t halves[2] = {0, 0};
                memcpy(halves, scale, 2);
                if (f.has_min) memcpy(halves + 1, scale + 2 * PANEL, 2);
                const float value = half_to_float(halves[0]) * (float)(code - f.zero) + half_to_float(halves[1]);
                store_value(g->out, g->type, (i * blocks + b) * COLUMNS + column, value);
            }
    }
    return 0;
}
