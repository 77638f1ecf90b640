/* Products with quantized weights: y = x W^T + bias, where W stays packed and x becomes 8-bit integers on the way in.

   A matrix [out, in] is stored in panels of 16 rows, a panel in blocks of 32 columns:
     codes       4 bits: 256 bytes; vector i (64 bytes: 16 rows of 4 columns) has columns 4i.. in its low nibbles and
                 16 + 4i.. in its high ones
                 6 bits: the same for the low 4 bits, then 128 bytes: byte j of half h has the high 2 bits of the bytes j
                 of vectors 0..3 of columns 16h.., lowest first
                 8 bits: 512 bytes, vector i has columns 4i..
     scales      16 float16 of the rows; with groups of 16, those of columns 0..15, then 16..31
     minima      16 float16, in formats that have them
   A weight is scale * (code - zero), or scale * code + minimum. The last panel is padded with zeros.

   Each block of 32 activations of a row becomes round(x / d), d = max |x| / 127, so that the product of a block is exact
   integer arithmetic, scaled once: d * scale * (sum(code * q) - zero * sum(q)) + minimum * d * sum(q).

   A residual addition and RMSNorm may come before, SwiGLU after. */

#include <math.h>
#include <stdlib.h>

#include "quant_simd.h"

#define EXPORT __attribute__((visibility("default")))
#define COLUMNS 32
#define PANEL 16
#define ROW_BLOCK 64  /* rows of x that share a pass over a panel, which stays in the cache */
#define FLOAT_ROWS 12 /* rows of x from which 8-bit codes become floats, see quant_simd.h */
#define SMALL 65536   /* products below which one thread is faster */

enum { FLOAT32, BFLOAT16 };

struct format {
    int bits, group, zero, has_min;
};

static const struct format formats[] = {
    {4, 32, 8, 0}, {4, 32, 0, 1}, {6, 32, 16, 0}, {6, 32, 0, 1}, {6, 16, 32, 0}, {8, 32, 128, 0},
};

struct scales { /* of a block of x: d, d * sum(q), and zero * sum(q) over all columns and over the first 16 */
    float d, sum;
    int32_t zeros, low_zeros;
};

struct product { /* everything of floats is of `type` */
    const void *x;
    long type, rows, columns;
    const uint8_t *weight;
    long format, outs;
    const void *bias; /* or NULL */
    void *out;        /* rows `stride` elements apart */
    long stride;
    const void *norm, *residual; /* or NULL: RMSNorm's weight; what is added before it */
    float eps;
    void *stream; /* takes x + residual */
    int gated;    /* silu(first half of the outputs) * the second half */
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

/* 32 activations, which become integers of `width` bytes, or floats (4). The sum with 1.5 * 2^23 leaves the nearest integer, ties to even, in the lowest bits. */
static void quantize(const float *x, const int width, int zero, int8_t *q, struct scales *scales) {
    uint32_t top = 0;
    for (int i = 0; i < COLUMNS; i++) {
        const uint32_t magnitude = to_bits(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    const float most = from_bits(top), inverse = most < 1e-30f ? 0 : 127 / most;
    int16_t rounded[COLUMNS];
    int32_t low = 0, high = 0;
    for (int i = 0; i < COLUMNS; i++)
        rounded[i] = (int16_t)(to_bits(x[i] * inverse + 12582912.0f) - to_bits(12582912.0f));
    for (int i = 0; i < COLUMNS / 2; i++) low += rounded[i], high += rounded[i + COLUMNS / 2];
    scales->d = most / 127;
    scales->sum = scales->d * (float)(low + high);
    scales->zeros = zero * (low + high), scales->low_zeros = zero * low;
    if (width == 4) {
        float values[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) values[i] = rounded[i];
        memcpy(q, values, sizeof values);
    } else if (width == 2) {
        int16_t ordered[COLUMNS];
        for (int i = 0; i < COLUMNS; i += 4) {
            ordered[i] = rounded[i], ordered[i + 1] = rounded[i + 2];
            ordered[i + 2] = rounded[i + 1], ordered[i + 3] = rounded[i + 3];
        }
        memcpy(q, ordered, sizeof ordered);
    } else
        for (int i = 0; i < COLUMNS; i++) q[i] = (int8_t)rounded[i];
}

INLINE codes fetch(const int bits, const uint8_t *block, const int quad, const int v) {
    const int at = v * 4 * LANES;
    if (bits == 8) return load_codes(block + 64 * quad + at);
    const codes both = load_codes(block + 64 * (quad & 3) + at);
    const codes low = quad < 4 ? low_nibbles(both) : high_nibbles(both);
    return bits == 4 ? low : add_high(low, load_codes(block + 256 + 64 * (quad >> 2) + at), quad & 3);
}

/* A panel times `rows` rows of x, whose codes are `x_stride` bytes and whose scales are `blocks` apart: [rows][16]. */
INLINE void tile(const int bits, const int group, const int has_min, const int rows, const uint8_t *block, const int8_t *x,
                 long x_stride, const struct scales *scales, long blocks, float *out) {
    const int width = bits == 8 && WIDE_X ? 2 : 1, quads = group / 4, signed_codes = bits == 8 && SIGNED_BYTES;
    floats total[MAX_ROWS][VECS];
    sums part[MAX_ROWS][VECS];
    ints whole[MAX_ROWS][VECS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)
        total[m][v] = all_floats(0), part[m][v] = no_sums(), whole[m][v] = all_ints(0);
    for (long b = 0; b < blocks; b++, block += block_bytes(bits, group, has_min), x += COLUMNS * width, scales++) {
        UNROLL for (int quad = 0; quad < COLUMNS / 4; quad++) {
            codes w[VECS];
            UNROLL for (int v = 0; v < VECS; v++) w[v] = fetch(bits, block, quad, v);
            UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)
                part[m][v] = dot(bits, part[m][v], w[v], x + m * x_stride + 4 * quad * width);
            const int last = quad % quads == quads - 1;
            if (last || quad % run(bits) == run(bits) - 1)
                UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++) {
                    whole[m][v] = add_ints(whole[m][v], widen(bits, part[m][v]));
                    part[m][v] = no_sums();
                }
            if (!last) continue;
            const uint8_t *at = block + 64 * bits + 2 * PANEL * (quad / quads);
            UNROLL for (int v = 0; v < VECS; v++) {
                const floats scale = load_halves(at + 2 * v * LANES);
                UNROLL for (int m = 0; m < rows; m++) {
                    const struct scales *of = scales + m * blocks;
                    if (!has_min && !signed_codes) {
                        ints zeros = all_ints(group == 32 ? of->zeros : of->low_zeros);
                        if (quad >= quads) zeros = sub_ints(all_ints(of->zeros), zeros);
                        whole[m][v] = sub_ints(whole[m][v], zeros);
                    }
                    total[m][v] = multiply_add(multiply(scale, all_floats(of->d)), to_floats(whole[m][v]), total[m][v]);
                    whole[m][v] = all_ints(0);
                    if (has_min)
                        total[m][v] = multiply_add(load_halves(at + 2 * (PANEL + v * LANES)), all_floats(of->sum), total[m][v]);
                }
            }
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECS; v++)
        store_floats(out + PANEL * m + v * LANES, total[m][v]);
}

typedef void tile_function(const uint8_t *, const int8_t *, long, const struct scales *, long, float *);

#define TILE(name, bits, group, has_min, rows)                                                                          \
    static void name##_##rows(const uint8_t *block, const int8_t *x, long x_stride, const struct scales *scales,        \
                              long blocks, float *out) {                                                               \
        tile(bits, group, has_min, rows, block, x, x_stride, scales, blocks, out);                                      \
    }
#if MAX_ROWS == 8
#define SIZES(make, ...) make(__VA_ARGS__, 1) make(__VA_ARGS__, 2) make(__VA_ARGS__, 4) make(__VA_ARGS__, 8)
#define NAMES(name) {name##_1, name##_2, name##_4, name##_8}
#elif MAX_ROWS == 4
#define SIZES(make, ...) make(__VA_ARGS__, 1) make(__VA_ARGS__, 2) make(__VA_ARGS__, 4)
#define NAMES(name) {name##_1, name##_2, name##_4}
#else
#define SIZES(make, ...) make(__VA_ARGS__, 1) make(__VA_ARGS__, 2)
#define NAMES(name) {name##_1, name##_2}
#endif
SIZES(TILE, q4, 4, 32, 0)
SIZES(TILE, q4_min, 4, 32, 1)
SIZES(TILE, q6, 6, 32, 0)
SIZES(TILE, q6_min, 6, 32, 1)
SIZES(TILE, q6_16, 6, 16, 0)
SIZES(TILE, q8, 8, 32, 0)

/* By format and logarithm of rows. */
static tile_function *const tiles[][4] = {NAMES(q4), NAMES(q4_min), NAMES(q6), NAMES(q6_min), NAMES(q6_16), NAMES(q8)};

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

#if WIDE_X
/* `tile` of 8-bit codes for any number of rows, x in floats. The same result: sums below 2^24 are exact. */
static void float_tiles(const uint8_t *block, const float *x, const struct scales *scales, long blocks, long rows,
                        float *out) {
    memset(out, 0, (size_t)rows * PANEL * sizeof *out);
    for (long b = 0; b < blocks; b++, block += block_bytes(8, COLUMNS, 0), x += COLUMNS, scales++) {
        float w[COLUMNS][PANEL];
        UNROLL for (int quad = 0; quad < COLUMNS / 4; quad++) UNROLL for (int v = 0; v < VECS; v++) {
            const codes four = fetch(8, block, quad, v);
            UNROLL for (int i = 0; i < 4; i++) store_floats(w[4 * quad + i] + v * LANES, code_column(four, i));
        }
        for (long row = 0; row < rows; row += MAX_ROWS) { /* those beyond the last repeat it and are not stored */
            const float *of[MAX_ROWS];
            floats part[MAX_ROWS][VECS];
            UNROLL for (int m = 0; m < MAX_ROWS; m++) {
                of[m] = x + (row + m < rows ? row + m : rows - 1) * blocks * COLUMNS;
                UNROLL for (int v = 0; v < VECS; v++) part[m][v] = all_floats(0);
            }
            for (int i = 0; i < COLUMNS; i++) {
                floats column[VECS];
                UNROLL for (int v = 0; v < VECS; v++) column[v] = load_floats(w[i] + v * LANES);
                UNROLL for (int m = 0; m < MAX_ROWS; m++) UNROLL for (int v = 0; v < VECS; v++)
                    part[m][v] = multiply_add(column[v], all_floats(of[m][i]), part[m][v]);
            }
            UNROLL for (int m = 0; m < MAX_ROWS; m++) UNROLL for (int v = 0; v < VECS; v++) {
                float *total = out + (row + m) * PANEL + v * LANES;
                if (row + m >= rows) continue;
                const floats scale = load_halves(block + 64 * 8 + 2 * v * LANES);
                const floats step = multiply(scale, all_floats(scales[(row + m) * blocks].d));
                store_floats(total, multiply_add(step, part[m][v], load_floats(total)));
            }
        }
    }
}
#endif

/* Bytes of an integer of x. */
static int width_of(const struct product *p) {
    return !WIDE_X || formats[p->format].bits != 8 ? 1 : p->rows < FLOAT_ROWS ? 2 : 4;
}

static void multiply_panel(const struct product *p, long panel, long first, long last, const int8_t *x, long x_stride,
                           const struct scales *scales) {
    const struct format f = formats[p->format];
    const long blocks = p->columns / COLUMNS, bytes = blocks * block_bytes(f.bits, f.group, f.has_min);
    const uint8_t *weight = p->weight + panel * bytes, *up = weight + p->outs / 2 / PANEL * bytes;
    float sums[ROW_BLOCK * PANEL], ups[ROW_BLOCK * PANEL];
#if WIDE_X
    if (width_of(p) == 4) {
        const float *of = (const float *)(x + first * x_stride);
        float_tiles(weight, of, scales + first * blocks, blocks, last - first, sums);
        if (p->gated) float_tiles(up, of, scales + first * blocks, blocks, last - first, ups);
        for (long m = first; m < last; m++) finish(p, m, panel * PANEL, sums + PANEL * (m - first), ups + PANEL * (m - first));
        return;
    }
#endif
    for (long row = first, size = MAX_ROWS, power = __builtin_ctz(MAX_ROWS); row < last; row += size) {
        while (size > last - row) size /= 2, power--;
        tile_function *const multiply = tiles[p->format][power];
        multiply(weight, x + row * x_stride, x_stride, scales + row * blocks, blocks, sums);
        if (p->gated) multiply(up, x + row * x_stride, x_stride, scales + row * blocks, blocks, ups);
        for (long m = 0; m < size; m++) finish(p, row + m, panel * PANEL, sums + PANEL * m, ups + PANEL * m);
    }
}

/* A row of x becomes x + residual, in x's type, and then normalised integers. */
static void normalise(const struct product *p, long row, int8_t *q, struct scales *scales) {
    const int width = width_of(p);
    const long blocks = p->columns / COLUMNS, at = row * p->columns;
    float values[COLUMNS], other[COLUMNS], squares[COLUMNS] = {0}, total = 0;
    for (long b = 0; b < blocks; b++) {
        load_values(p->x, p->type, at + b * COLUMNS, COLUMNS, values);
        if (p->residual) {
            load_values(p->residual, p->type, at + b * COLUMNS, COLUMNS, other);
            for (int i = 0; i < COLUMNS; i++) values[i] += other[i];
            store_values(p->stream, p->type, at + b * COLUMNS, COLUMNS, values);
            load_values(p->stream, p->type, at + b * COLUMNS, COLUMNS, values);
        }
        for (int i = 0; i < COLUMNS; i++) squares[i] += values[i] * values[i];
    }
    for (int i = 0; i < COLUMNS; i++) total += squares[i];
    const float scale = 1 / sqrtf(total / (float)p->columns + p->eps);
    for (long b = 0; b < blocks; b++) {
        load_values(p->residual ? p->stream : p->x, p->type, at + b * COLUMNS, COLUMNS, values);
        load_values(p->norm, p->type, b * COLUMNS, COLUMNS, other);
        for (int i = 0; i < COLUMNS; i++) values[i] = values[i] * scale * other[i];
        quantize(values, width, formats[p->format].zero, q + b * COLUMNS * width, scales + b);
    }
}

/* Shared by the threads of the region that calls it, all with the same arguments. */
static void work(const struct product *p, int8_t *x, struct scales *scales) {
    const struct format f = formats[p->format];
    const int width = width_of(p);
    const long blocks = p->columns / COLUMNS, x_stride = p->columns * width, outs = p->gated ? p->outs / 2 : p->outs;
    const long panels = (outs + PANEL - 1) / PANEL, row_blocks = (p->rows + ROW_BLOCK - 1) / ROW_BLOCK;
    if (p->norm) {
#pragma omp for schedule(static)
        for (long row = 0; row < p->rows; row++) normalise(p, row, x + row * x_stride, scales + row * blocks);
    } else {
#pragma omp for schedule(static)
        for (long i = 0; i < p->rows * blocks; i++) {
            float values[COLUMNS];
            load_values(p->x, p->type, i * COLUMNS, COLUMNS, values);
            quantize(values, width, f.zero, x + i * COLUMNS * width, scales + i);
        }
    }
#pragma omp for schedule(static) collapse(2)
    for (long r = 0; r < row_blocks; r++)
        for (long panel = 0; panel < panels; panel++) {
            const long first = r * ROW_BLOCK, last = first + ROW_BLOCK;
            multiply_panel(p, panel, first, last < p->rows ? last : p->rows, x, x_stride, scales);
        }
}

/* 0, or -1 without memory. x, residual and stream are contiguous; gated halves end with a panel. */
EXPORT int octavo_quant_linear(const void *x, long type, long rows, long columns, const void *weight, long format,
                               long outs, const void *bias, void *out, long stride, const void *norm,
                               const void *residual, float eps, void *stream, int gated) {
    const struct product p = {x,   type,   rows, columns,  weight, format, outs, bias,
                              out, stride, norm, residual, eps,    stream, gated};
    const long blocks = rows * (columns / COLUMNS);
    struct scales *scales = malloc((size_t)(blocks + 1) * (sizeof *scales + (size_t)width_of(&p) * COLUMNS));
    if (!scales) return -1;
#pragma omp parallel if (rows * columns * outs > SMALL)
    work(&p, (int8_t *)(scales + blocks), scales);
    free(scales);
    return 0;
}

/* Rows `index` of a packed matrix as floats, contiguous: [count, columns]. */
EXPORT void octavo_quant_rows(const uint8_t *weight, long format, long columns, const int64_t *index, long count, void *out,
                              long type) {
    const struct format f = formats[format];
    const long blocks = columns / COLUMNS, bytes = block_bytes(f.bits, f.group, f.has_min);
    for (long i = 0; i < count; i++) {
        const long lane = index[i] % PANEL;
        const uint8_t *block = weight + index[i] / PANEL * blocks * bytes;
        for (long b = 0; b < blocks; b++, block += bytes)
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
                store_value(out, type, (i * blocks + b) * COLUMNS + column, value);
            }
    }
}
