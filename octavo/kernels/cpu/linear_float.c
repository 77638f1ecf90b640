/* y = x w^T + b for weights [out, in] as checkpoints store them, floats or bfloat16.
 *
 * A thread owns a range of panels of PANEL weight rows and reads each weight once per block of BLOCK tokens, a chunk of
 * columns at a time, so that the chunk of the panel stays in the first-level cache while all tokens pass it and the next
 * panel comes in. A single token is a stream of weights at the speed of memory.
 *
 * bfloat16 weights are widened, for many tokens into that cache, for FEW in registers: a 32-bit word is two weights, of
 * which a shift makes the even one and a mask the odd one, so the tokens are laid out as VL even, then VL odd elements
 * ("split"). A processor with bfloat16 products takes weights and tokens as they are.
 */
#include "common.h"
#include "team.h"

#define COLUMNS ROWS  /* of a tile: tokens */
#define HEIGHT TOKENS /* of a tile: weight rows */
#define PANEL (2 * HEIGHT)
#define BLOCK 128
#define CHUNK (VL == 8 ? 768 : 640) /* columns of floats: PANEL * CHUNK * 4 bytes stay in the first-level cache */
#define FEW 16                      /* tokens up to which widening in registers is better than in the cache */
#define PREFETCHES ((HEIGHT * VL * 4 + 63) / 64) /* of cache lines, at most, in a step of a tile */
#define AHEAD 1024                                /* bytes that a single token's product prefetches */

#if defined(__AVX512BF16__) && VL == 16
#define MULTIPLIES_BF16 1
#else
#define MULTIPLIES_BF16 0
#endif

typedef enum { FLOATS, SPLIT, NATIVE } Kind;

typedef struct {
    const void *x, *w, *bias;
    void *y;
    long tokens, in, out;
    long stride; /* of x: elements from a token to the next */
    bool half_x, half_w, half_y;
} Product;

INLINE void finish(const Product *p, const float *sums, long token, long row, long rows) {
    long to = token * p->out + row;
    for (long r = 0; r < rows; r++) {
        float y = sums[r] + (p->bias ? get_one(p->bias, row + r, p->half_w) : 0.0f);
        put_one(p->y, to + r, y, p->half_y);
    }
}

/* w[r] = row first + r of a matrix of `stride` columns; the last row stands in for rows beyond it. */
INLINE void pointers(const void *w[], const void *base, long first, long rows, int count, long stride, bool half) {
    for (int r = 0; r < count; r++) w[r] = at(base, (first + (r < rows ? r : rows - 1)) * stride, half);
}

/* Part `part` of a step of weights, and of tokens: only SPLIT has a second. */
INLINE vf weights(const void *w, Kind kind, int part) {
    if (kind != SPLIT) return load(w);
    vu pair = *(const vu_mem *)w;
    return (vf)(part ? pair & 0xffff0000 : pair << 16);
}

INLINE vf times(vf total, vf w, vf x, Kind kind) {
#if MULTIPLIES_BF16
    if (kind == NATIVE) return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)x);
#endif
    (void)kind;
    return total + w * x;
}

/* total += the products of a step: VL floats, or 2 VL bfloat16, of a weight row and a token. */
INLINE vf step(vf total, const void *w, const void *x, Kind kind) {
    total = times(total, weights(w, kind, 0), load(x), kind);
    return kind == SPLIT ? times(total, weights(w, kind, 1), load((const float *)x + VL), kind) : total;
}

/* Elements of a step, and bytes of a step of weights and of tokens. */
#define WIDTH(kind) (kind == FLOATS ? VL : 2 * VL)
#define W_BYTES (VL * 4)
#define X_BYTES(kind) (kind == SPLIT ? VL * 8 : VL * 4)

/* The last k elements, fewer than a step, of a row and a token, which zeros follow where kind is SPLIT. */
static vf step_some(vf total, const char *w, const char *x, long k, Kind kind) {
    char row[W_BYTES] = {0}, column[2 * W_BYTES] = {0};
    memcpy(row, w, (size_t)k * (kind == FLOATS ? 4 : 2));
    memcpy(column, x, kind == SPLIT ? X_BYTES(SPLIT) : (size_t)k * (kind == FLOATS ? 4 : 2));
    return step(total, row, column, kind);
}

/* sums[r][c] = w[r] . x[c] over k elements; step i prefetches the lines in next + i * stride ... + stride. */
INLINE void tile(const void *const w[HEIGHT], const char *x, long x_bytes, int columns, long k, Kind kind,
                 const char *next, long stride, float sums[HEIGHT][COLUMNS]) {
    vf total[HEIGHT][COLUMNS] = {{{0}}};
    const char *row[HEIGHT], *column[COLUMNS];
    UNROLL for (int r = 0; r < HEIGHT; r++) row[r] = w[r];
    UNROLL for (int c = 0; c < columns; c++) column[c] = x + c * x_bytes;
    const long steps = k / WIDTH(kind);
    for (long i = 0; i < steps; i++) {
        UNROLL for (int j = 0; j < PREFETCHES; j++) __builtin_prefetch(next + j * stride / PREFETCHES, 0, 2);
        next += stride;
        for (int part = 0; part < (kind == SPLIT ? 2 : 1); part++) {
            vf now[HEIGHT];
            UNROLL for (int r = 0; r < HEIGHT; r++) now[r] = weights(row[r] + i * W_BYTES, kind, part);
            UNROLL for (int c = 0; c < columns; c++) {
                vf with = load((const float *)(column[c] + i * X_BYTES(kind)) + part * VL);
                UNROLL for (int r = 0; r < HEIGHT; r++) total[r][c] = times(total[r][c], now[r], with, kind);
            }
        }
    }
    if (steps * WIDTH(kind) < k)
        for (int r = 0; r < HEIGHT; r++)
            for (int c = 0; c < columns; c++)
                total[r][c] = step_some(total[r][c], row[r] + steps * W_BYTES, column[c] + steps * X_BYTES(kind),
                                        k - steps * WIDTH(kind), kind);
    UNROLL for (int r = 0; r < HEIGHT; r++) sums_of(total[r], sums[r]);
}

typedef void Tile(const void *const w[HEIGHT], const char *x, long x_bytes, long k, const char *next, long stride,
                  float sums[HEIGHT][COLUMNS]);

#define TILE(kind, columns)                                                                                        \
    static void tile_##kind##_##columns(const void *const w[HEIGHT], const char *x, long x_bytes, long k,          \
                                        const char *next, long stride, float sums[HEIGHT][COLUMNS]) {              \
        tile(w, x, x_bytes, columns, k, kind, next, stride, sums);                                                 \
    }
#define TILES(kind) TILE(kind, 1) TILE(kind, 2) TILE(kind, 3) TILE(kind, 4)
#define NAMES(kind) {tile_##kind##_1, tile_##kind##_2, tile_##kind##_3, tile_##kind##_4}

TILES(FLOATS)
TILES(SPLIT)
#if MULTIPLIES_BF16
TILES(NATIVE)
static Tile *const tiles[][COLUMNS] = {NAMES(FLOATS), NAMES(SPLIT), NAMES(NATIVE)};
#else
static Tile *const tiles[][COLUMNS] = {NAMES(FLOATS), NAMES(SPLIT)};
#endif

/* One token: rows one after the other, which is the order of memory. */
INLINE void one(const Product *p, const char *x, long first, long last, Kind kind) {
    const long steps = p->in / WIDTH(kind), rest = p->in - steps * WIDTH(kind);
    for (long row = first; row < last; row += ROWS) {
        vf total[ROWS];
        float sums[ROWS];
        long rows = last - row < ROWS ? last - row : ROWS, i;
        const void *w[ROWS];
        pointers(w, p->w, row, rows, ROWS, p->in, kind != FLOATS);
        for (int r = 0; r < ROWS; r++) {
            const char *from = w[r], *with = x;
            vf part[4] = {{0}};
            for (i = 0; i + 4 <= steps; i += 4) {
                UNROLL for (int j = 0; j < 4; j++) {
                    if (j * W_BYTES % 64 == 0) __builtin_prefetch(from + j * W_BYTES + AHEAD);
                    part[j] = step(part[j], from + j * W_BYTES, with + j * X_BYTES(kind), kind);
                }
                from += 4 * W_BYTES;
                with += 4 * X_BYTES(kind);
            }
            for (; i < steps; i++) {
                part[0] = step(part[0], from, with, kind);
                from += W_BYTES;
                with += X_BYTES(kind);
            }
            total[r] = (part[0] + part[1]) + (part[2] + part[3]);
            if (rest) total[r] = step_some(total[r], from, with, rest, kind);
        }
        sums_of(total, sums);
        finish(p, sums, 0, row, rows);
    }
}

static void one_floats(const Product *p, const char *x, long first, long last) { one(p, x, first, last, FLOATS); }
static void one_split(const Product *p, const char *x, long first, long last) { one(p, x, first, last, SPLIT); }
#if MULTIPLIES_BF16
static void one_native(const Product *p, const char *x, long first, long last) { one(p, x, first, last, NATIVE); }
#else
#define one_native one_split
#endif

/* Tokens [token, token + tokens), x_bytes apart in x, with one panel of weight rows. */
static void panel(const Product *p, const char *x, long x_bytes, long token, long tokens, long row, Kind kind) {
    float sums[BLOCK][PANEL], part[HEIGHT][COLUMNS];
    float wide[PANEL * CHUNK] __attribute__((aligned(64)));
    const bool widened = p->half_w && kind == FLOATS;
    const long rows = p->out - row < PANEL ? p->out - row : PANEL;
    const long size = kind == NATIVE ? 2 : 4, most = kind == NATIVE ? 2 * CHUNK : CHUNK;
    const long chunks = (p->in + most - 1) / most;
    const long chunk = ((p->in + chunks - 1) / chunks + 2 * VL - 1) / (2 * VL) * (2 * VL);
    const char *next = at(p->w, (row + PANEL) * p->in, p->half_w), *end = at(next, PANEL * p->in, p->half_w);
    const long passes = (tokens + COLUMNS - 1) / COLUMNS, spread = 64 * ((PREFETCHES + passes - 1) / passes);
    for (long k = 0; k < p->in; k += chunk) {
        const long width = p->in - k < chunk ? p->in - k : chunk;
        const void *w[PANEL];
        pointers(w, at(p->w, k, p->half_w), row, rows, PANEL, p->in, p->half_w);
        if (widened)
            for (int r = 0; r < PANEL; r++) {
                if (r < rows) widen_row(wide + r * chunk, w[r], width);
                w[r] = wide + (r < rows ? r : rows - 1) * chunk;
            }
        for (long t = 0; t < tokens; t += COLUMNS) {
            const int columns = tokens - t < COLUMNS ? (int)(tokens - t) : COLUMNS;
            for (int upper = 0; upper < PANEL; upper += HEIGHT) {
                const long stride = next < end ? spread : 0;
                tiles[kind][columns - 1](w + upper, x + t * x_bytes + k * size, x_bytes, width, next, stride, part);
                next += width / (kind == FLOATS ? VL : 2 * VL) * stride;
                for (int c = 0; c < columns; c++)
                    for (int r = 0; r < HEIGHT; r++) {
                        float *sum = &sums[t + c][upper + r];
                        *sum = part[r][c] + (k ? *sum : 0.0f);
                    }
            }
        }
    }
    for (long t = 0; t < tokens; t++) finish(p, sums[t], token + t, row, rows);
}

/* Columns of the scratch's rows. */
INLINE long padded(long in) { return (in + 2 * VL - 1) / (2 * VL) * (2 * VL); }

/* Puts floats into the split order, with zeros up to the end of the last step. */
INLINE void split(float *row, long in) {
    memset(row + in, 0, (size_t)(padded(in) - in) * 4);
    for (long i = 0; i < in; i += 2 * VL) {
        float pairs[2 * VL];
        memcpy(pairs, row + i, sizeof pairs);
        for (long j = 0; j < VL; j++) {
            row[i + j] = pairs[2 * j];
            row[i + VL + j] = pairs[2 * j + 1];
        }
    }
}

/* Whether bfloat16 tokens and weights are multiplied as they are. */
EXPORT int multiplies_bf16(void) { return MULTIPLIES_BF16; }

typedef struct {
    const void *x;        /* [tokens, in], `stride` elements apart; x, residual, total, norm_weight and y are of one type */
    const void *residual; /* [tokens, in], or NULL: nothing is added */
    void *total;          /* takes x + residual */
    const void *norm;     /* [in], or NULL: x is multiplied as it is */
    const void *w, *bias; /* [out, in] and [out], or NULL, of one type */
    void *y;              /* [tokens, out]; gated: out / 2 */
    int64_t stride, tokens, in, out;
    float eps;
    int32_t half_x, half_w;
    int32_t gated; /* silu of the first half of each result times the second half */
} Linear;

/* The token as the product takes it: x, or the norm of x + residual, as floats or split or, for NATIVE, bfloat16. */
INLINE void prepare(const Product *p, const Linear *of, long token, void *row, Kind kind, bool half) {
    const void *x = at(p->x, token * p->stride, half);
    if (of->norm) {
        if (of->residual) {
            void *total = into(of->total, token * p->in, half);
            add_row(total, x, at(of->residual, token * p->in, half), p->in, half);
            x = total;
        }
        scale_row(row, kind == NATIVE, x, of->norm, inverse_rms(x, p->in, of->eps, half), p->in, half);
    } else if (half && kind != NATIVE) {
        widen_row(row, x, p->in);
    } else {
        memcpy(row, x, (size_t)p->in * (half ? 2 : 4));
    }
    if (kind == SPLIT) split(row, p->in);
}

/* Multiplies all tokens with the panels that fall to this thread of the team. */
static void multiply(const Product *p, const char *x, long x_bytes, Kind kind) {
    const long height = p->tokens > 1 ? PANEL : 2 * ROWS, panels = (p->out + height - 1) / height;
    for (long token = 0; token < p->tokens; token += BLOCK) {
        const long count = p->tokens - token < BLOCK ? p->tokens - token : BLOCK;
#pragma omp for schedule(static) nowait
        for (long i = 0; i < panels; i++) {
            const long first = i * height, last = first + height < p->out ? first + height : p->out;
            if (p->tokens > 1) panel(p, x + token * x_bytes, x_bytes, token, count, first, kind);
            else if (kind == NATIVE) one_native(p, x, first, last);
            else if (kind == SPLIT) one_split(p, x, first, last);
            else one_floats(p, x, first, last);
        }
    }
}

/* y = x w^T + bias, or of the norm of x + residual, which becomes total, instead of x. */
EXPORT int linear(Team *team, const void *arguments) {
    const Linear *a = arguments;
    const long tokens = a->tokens, in = a->in, half = a->out / 2;
    const bool native = MULTIPLIES_BF16 && a->half_x && a->half_w;
    const bool copied = a->norm || a->stride != in || (!native && (a->half_x || a->half_w));
    const Kind kind = native ? NATIVE : a->half_w && tokens <= FEW ? SPLIT : FLOATS;
    const long x_bytes = (kind == SPLIT ? padded(in) : in) * (native ? 2 : 4);
    const long rows = copied ? (tokens * x_bytes + 63) / 64 * 64 : 0, wide = a->gated ? tokens * a->out * 4 : 0;
    char *memory = team_memory(team, rows + wide);
    if (rows + wide && !memory) return 1;
    float *both = (float *)(memory + rows);
    const Product p = {a->x, a->w, a->bias, a->gated ? both : a->y, tokens, in, a->out, a->stride, a->half_x, a->half_w,
                       a->half_x && !a->gated};
    if (copied) {
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++) {
            if (a->half_x) prepare(&p, a, t, memory + t * x_bytes, kind, true);
            else prepare(&p, a, t, memory + t * x_bytes, kind, false);
        }
    }
    multiply(&p, copied ? memory : a->x, x_bytes, kind);
    if (a->gated) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
        for (long t = 0; t < tokens; t++) {
            const float *gate = both + t * a->out;
            if (a->half_x) gate_row(into(a->y, t * half, true), true, gate, gate + half, half, false);
            else gate_row(into(a->y, t * half, false), false, gate, gate + half, half, false);
        }
    }
    return 0;
}
