/* What the products of a format share with those who prepare their input: how matrices and activations lie in memory.

   A matrix [out, in] is stored in panels of 16 rows, a panel in blocks of 32 columns:
     codes       4 bits: 256 bytes; vector i (64 bytes: 16 rows of 4 columns) has columns 4i.. in its low nibbles and
                 16 + 4i.. in its high ones
                 6 bits: the same for the low 4 bits, then 128 bytes: byte j of half h has the high 2 bits of the bytes j
                 of vectors 0..3 of columns 16h.., lowest first
                 8 bits: 512 bytes, vector i has columns 4i..
     scales      16 float16 of the rows; with groups of 16, those of columns 0..15, then 16..31
     minima      16 float16, in formats that have them
   A weight is scale * (code - zero), or scale * code + minimum. The last panel is padded with zeros. */
#ifndef OCTAVO_QUANT_LAYOUT_H
#define OCTAVO_QUANT_LAYOUT_H

#include "quant_simd.h"
#include "team.h"

#define COLUMNS 32
#define PANEL 16
#define ROW_BLOCK 64 /* rows of x that share a pass over a panel, which stays in the cache */

struct record { /* of a block of a row of x: d, d * sum(q), and zero * sum(q) over all columns and over the first 16 */
    float d, sum;
    int32_t zeros, low_zeros;
    int8_t q[]; /* 32; where WIDE_X those of codes of 8 bits are int16: 128 * q + r */
};

INLINE long block_bytes(const int bits, const int group, const int has_min) {
    return 64 * bits + PANEL * 2 * (COLUMNS / group + has_min);
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

/* to [count, 16] = a panel of a matrix times `count` rows of x from the first of a ROW_BLOCK on. */
typedef void panel_function(const uint8_t *panel, const struct activations *x, long row_block, long count, float *to);

#endif
