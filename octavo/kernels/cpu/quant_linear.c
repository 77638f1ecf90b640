/* Products with quantized weights: y = x W^T + bias, where W stays packed and x becomes integers on the way in.
   quant_layout.h says how both lie in memory.

   Each block of 32 activations of a row becomes d * (q + r / 128), d = max |x| / 127, q and r integers of 8 bits, so that
   the product of a block is exact integer arithmetic, scaled once: d * scale * (sum(code * q) - zero * sum(q)) + minimum *
   d * sum(q). The remainder r counts only in blocks with a value that is OUTLIER times the root mean square of its row:
   there d is coarse for all others, and such a block's error is most of the row's. In language models that is a hundredth
   of the blocks, so the remainders, which are multiplied like further rows of x, cost nothing.

   A residual addition and RMSNorm may come before, SwiGLU after. */

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "quant_layout.h"

#define OUTLIER 14

enum { FLOAT32, BFLOAT16 };

struct format {
    int bits, group, zero, has_min;
};

static const struct format formats[] = {
    {4, 32, 8, 0}, {4, 32, 0, 1}, {6, 32, 16, 0}, {6, 32, 0, 1}, {6, 16, 32, 0}, {8, 32, 128, 0},
};

struct product { /* everything of floats is of `type`; mirrored in quant_linear.py */
    const void *x; /* contiguous, as residual and stream are */
    const uint8_t *weight;
    const void *bias;            /* or NULL */
    void *out;                   /* rows `stride` elements apart */
    const void *norm, *residual; /* or NULL: RMSNorm's weight; what is added before it */
    void *stream;                /* takes x + residual */
    panel_function *multiply;    /* the format's, of quant_formats.c */
    int64_t type, rows, columns, format, outs, stride;
    float eps;
    int32_t gated; /* silu(first half of the outputs) * the second half; the halves end with a panel */
};

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
    p->multiply(weight, x, row_block, count, sums);
    if (p->gated) p->multiply(up, x, row_block, count, ups);
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
