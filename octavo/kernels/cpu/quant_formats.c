/* Panels of a matrix of some formats times activations: quant_layout.h describes both, quant_linear.c makes the latter.

   A library has the formats that FORMATS names: bit i stands for formats[i] of quant_linear.c. */

#include <stddef.h>

#include "quant_layout.h"

#define AHEAD 1024 /* bytes of weights that are prefetched */

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

/* The products of a format, NULL where the library is without. */
EXPORT panel_function *octavo_quant_product(int format) { return multiplies[format]; }
