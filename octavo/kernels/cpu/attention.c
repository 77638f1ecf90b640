/* Paged attention of a whole batch in one call: rows of any number of query tokens over blocks of keys and values.
 *
 * A piece of work is one KV head of up to COLUMNS (query token, head) pairs over a range of keys, KEYS at a time with
 * a running softmax (arXiv:1805.02867). A query sees the keys of its row up to its own position, within the window;
 * memory beyond the row's newest token or before its window is never read. Rows of one query token are cut into parts
 * of PART keys whatever the number of threads, so a result depends on its own row alone; a second pass joins the parts.
 */
#include "common.h"
#include "team.h"

#define COLUMNS 48
#define KEYS 64
#define PART 512
#define MAX_DIM 256
#define MANY 8 /* pieces from which a thread takes all KV heads of one, which lie side by side in memory */

/* What a step's layers share: see octavo.attention.cpu. */
typedef struct {
    const int32_t *tables;   /* [lines, table_stride] block ids */
    const int64_t *lines;    /* [rows] line of `tables`; NULL: the row itself */
    const int32_t *q_start;  /* [rows + 1] where a row's query tokens begin */
    const int32_t *seq_lens; /* [rows] tokens of the row, its query tokens being the last */
    int64_t rows, table_stride, block_size, heads, kv_heads, dim;
    int64_t window;          /* 0: none */
    int64_t half_kv;
} Step;

typedef struct {
    Step step;
    const char *q;     /* tokens [heads, dim], q_stride elements apart */
    const char *k, *v; /* [blocks, block_size, kv_heads, dim] */
    char *out;         /* [tokens, heads, dim] */
    int64_t q_stride;
    float scale;
    int32_t half_q;
} Attention;

typedef struct {
    const Step *step;
    const Attention *of;
    float *parts; /* of rows in parts: per (row, part, head) maximum, sum, dim floats */
} Call;

typedef struct {
    int32_t row, first, count; /* query tokens [first, first + count) of the row */
    int32_t from, to;          /* keys [from, to) */
    int64_t part;              /* index of its part in Call.parts; -1: the whole result */
} Piece;

typedef struct {
    float q[COLUMNS * MAX_DIM], out[COLUMNS * MAX_DIM];
    float k[KEYS * MAX_DIM], v[KEYS * MAX_DIM];
    float scores[COLUMNS][KEYS];
    float top[COLUMNS], sum[COLUMNS];
} Scratch;

INLINE long rounded(long dim) { return (dim + VL - 1) / VL * VL; }

/* Addresses of the keys (or values) at positions [from, from + count) for one head. */
static void addresses(const void *row[], const Step *s, const char *cache, const int32_t *table, long from, long count,
                      long head) {
    const long size = s->half_kv ? 2 : 4, token = s->kv_heads * s->dim * size;
    long block = from / s->block_size, offset = from % s->block_size;
    for (long i = 0; i < count; offset = 0) {
        const char *at_row = cache + ((long)table[block++] * s->block_size + offset) * token + head * s->dim * size;
        for (; offset < s->block_size && i < count; offset++, at_row += token) row[i++] = at_row;
    }
}

/* Starts the way of a row into the caches. */
INLINE void fetch(const void *row, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i);
}

/* Copies rows to floats, `stride` apart and with zeros behind, and makes `row` point there; fetches other rows. */
static void gather(float *into, const void *row[], const void *const other[], long count, long dim, long stride,
                   bool half) {
    for (long i = 0; i < count; i++) {
        float *to = into + i * stride;
        fetch(other[i], dim * (half ? 2 : 4));
        if (half) widen_row(to, row[i], dim);
        else memcpy(to, row[i], (size_t)dim * 4);
        for (long d = dim; d < stride; d++) to[d] = 0.0f;
        row[i] = to;
    }
}

/* sums[c][r] = row[r] . x[c] over k floats, or bfloat16 if `half`; x[c] lie k floats apart. */
INLINE void dot_tile(const void *const row[ROWS], const float *x, int columns, long k, bool half, float sums[][ROWS]) {
    vf total[TOKENS][ROWS] = {{{0}}};
    for (long i = 0; i < k; i += VL) {
        vf now[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) now[r] = get(row[r], i, half);
        UNROLL for (int c = 0; c < columns; c++) {
            vf column = load(x + c * k + i);
            UNROLL for (int r = 0; r < ROWS; r++) total[c][r] += now[r] * column;
        }
    }
    UNROLL for (int c = 0; c < columns; c++) sums_of(total[c], sums[c]);
}

typedef void Dot(const void *const row[ROWS], const float *x, long k, float sums[][ROWS]);

#define DOT(name, columns, half)                                                                                       \
    __attribute__((noinline)) static void name(const void *const row[ROWS], const float *x, long k, float sums[][ROWS]) { \
        dot_tile(row, x, columns, k, half, sums);                                                                      \
    }
DOT(dot_one, 1, false)
DOT(dot_many, TOKENS, false)
DOT(dot_one_half, 1, true)
DOT(dot_many_half, TOKENS, true)
static Dot *const dots[2][2] = {{dot_one, dot_many}, {dot_one_half, dot_many_half}};

/* scores[c][i] = q[c] . key[i]; the values come closer meanwhile. */
static void score(Scratch *s, const void *const key[], const void *const value[], long bytes, long keys, long columns,
                  long dim, bool half) {
    for (long i = 0; i < keys; i += ROWS) {
        const void *quad[ROWS];
        float sums[TOKENS][ROWS];
        for (int r = 0; r < ROWS; r++) {
            const long j = i + r < keys ? i + r : keys - 1;
            quad[r] = key[j];
            fetch(value[j], bytes);
        }
        for (long c = 0; c < columns;) {
            const bool many = columns - c >= TOKENS;
            const long count = many ? TOKENS : 1;
            dots[half][many](quad, s->q + c * dim, dim, sums);
            for (long j = 0; j < count; j++) memcpy(&s->scores[c + j][i], sums[j], sizeof sums[j]);
            c += count;
        }
    }
}

/* Turns scores of visible keys [from, to) of a column into weights relative to the new maximum, others into 0. */
INLINE void soften(Scratch *s, long column, long from, long to, long dim) {
    float *score = s->scores[column];
    for (long i = 0; i < from; i++) score[i] = -INFINITY;
    for (long i = to; i < KEYS; i++) score[i] = -INFINITY;
    vf best = splat(-INFINITY);
    for (long i = 0; i < KEYS; i += VL) best = larger(best, load(score + i));
    float before = s->top[column], top = largest_of(best);
    if (!(top > before)) top = before;
    vf total = {0};
    for (long i = 0; i < KEYS; i += VL) {
        vf weight = exp_of(load(score + i) - top);
        total += weight;
        store(score + i, weight);
    }
    if (top != before) {
        float kept = before == -INFINITY ? 0.0f : expf(before - top);
        float *out = s->out + column * dim;
        for (long d = 0; d < dim; d += VL) store(out + d, load(out + d) * kept);
        s->sum[column] *= kept;
        s->top[column] = top;
    }
    s->sum[column] += sum_of(total);
}

/* out[c][d ...] += sum over keys of scores[c][i] * value[i][d ...], `wide` vectors of dimensions of `columns` columns.
 * With `next` the keys there, `bytes` each, come closer meanwhile.
 */
INLINE void mix_tile(float *out, const float *weight, const void *const value[], long keys, int columns, int wide,
                     bool half, long d, long dim, const void *const next[], long bytes) {
    vf total[TOKENS][ROWS];
    UNROLL for (int j = 0; j < columns; j++)
        UNROLL for (int w = 0; w < wide; w++) total[j][w] = load(out + j * dim + d + w * VL);
    for (long i = 0; i < keys; i++) {
        if (next) fetch(next[i], bytes);
        vf row[ROWS];
        UNROLL for (int w = 0; w < wide; w++) row[w] = get(value[i], d + w * VL, half);
        UNROLL for (int j = 0; j < columns; j++) {
            vf share = splat(weight[j * KEYS + i]);
            UNROLL for (int w = 0; w < wide; w++) total[j][w] += share * row[w];
        }
    }
    UNROLL for (int j = 0; j < columns; j++)
        UNROLL for (int w = 0; w < wide; w++) store(out + j * dim + d + w * VL, total[j][w]);
}

typedef void Mix(float *out, const float *weight, const void *const value[], long keys, long d, long dim,
                 const void *const next[], long bytes);

#define MIX(name, columns, wide, half)                                                                               \
    __attribute__((noinline)) static void name(float *out, const float *weight, const void *const value[], long keys, \
                                               long d, long dim, const void *const next[], long bytes) {             \
        mix_tile(out, weight, value, keys, columns, wide, half, d, dim, next, bytes);                                \
    }
#define MIXES(name, half)          \
    MIX(name##_narrow, 1, 1, half) \
    MIX(name, 1, ROWS, half)       \
    MIX(name##s_narrow, TOKENS, 1, half) MIX(name##s, TOKENS, ROWS, half)
MIXES(mix_float, false)
MIXES(mix_half, true)
static Mix *const mixes[2][2][2] = {{{mix_float_narrow, mix_float}, {mix_floats_narrow, mix_floats}},
                                    {{mix_half_narrow, mix_half}, {mix_halfs_narrow, mix_halfs}}};

static void mix(Scratch *s, const void *const value[], long keys, long columns, long dim, bool half,
                const void *const next[], long bytes) {
    for (long c = 0; c < columns;) {
        const bool many = columns - c >= TOKENS;
        for (long d = 0; d < dim;) {
            const bool wide = d + ROWS * VL <= dim;
            mixes[half][many][wide](s->out + c * dim, s->scores[c], value, keys, d, dim, next, bytes);
            next = NULL;
            d += wide ? ROWS * VL : VL;
        }
        c += many ? TOKENS : 1;
    }
}

typedef struct {
    const void *key[KEYS], *value[KEYS];
} Rows;

/* One tile of keys for all columns, `next` being the one after; column c's query stands at `first` + c / group. */
static void tile_of_keys(Scratch *s, const Step *step, Rows *rows, const Rows *next, long from, long keys, long columns,
                         long group, long first) {
    const long dim = rounded(step->dim), bytes = step->dim * (step->half_kv ? 2 : 4);
    const bool padded = dim != step->dim, half = step->half_kv && !padded && columns <= TOKENS; /* read as they are */
    if (padded || (step->half_kv && !half)) {
        gather(s->k, rows->key, rows->value, keys, step->dim, dim, step->half_kv);
        gather(s->v, rows->value, next->key, keys, step->dim, dim, step->half_kv);
    }
    score(s, rows->key, rows->value, bytes, keys, columns, dim, half);
    for (long c = 0; c < columns; c++) {
        long position = first + c / group, low = step->window ? position - step->window + 1 - from : 0;
        long end = position + 1 - from;
        low = low < 0 ? 0 : low > keys ? keys : low;
        end = end < low ? low : end > keys ? keys : end;
        if (low < end) soften(s, c, low, end, dim);
        else memset(s->scores[c], 0, sizeof s->scores[c]);
    }
    mix(s, rows->value, keys, columns, dim, half, next->key, bytes);
}

/* Heads [h, h + group) of a piece's query tokens, all of which share KV head `head`; the caller goes on with head `next`. */
static void attend(Scratch *s, const Call *call, const Piece *piece, long head, long h, long group, long next) {
    const Step *step = call->step;
    const Attention *of = call->of;
    const long dim = rounded(step->dim), columns = piece->count * group;
    const long begin = step->q_start[piece->row] + piece->first;
    const long queries = step->q_start[piece->row + 1] - step->q_start[piece->row];
    const long first = step->seq_lens[piece->row] - queries + piece->first;
    const int32_t *table = step->tables + (step->lines ? step->lines[piece->row] : piece->row) * step->table_stride;
    for (long c = 0; c < columns; c++) {
        long at_q = (begin + c / group) * of->q_stride + (h + c % group) * step->dim;
        for (long d = 0; d < step->dim; d++) s->q[c * dim + d] = get_one(of->q, at_q + d, of->half_q) * of->scale;
        for (long d = step->dim; d < dim; d++) s->q[c * dim + d] = 0.0f;
        s->top[c] = -INFINITY;
        s->sum[c] = 0.0f;
    }
    memset(s->out, 0, (size_t)(columns * dim) * 4);
    Rows rows[2];
    long keys = piece->to - piece->from < KEYS ? piece->to - piece->from : KEYS;
    addresses(rows[0].key, step, of->k, table, piece->from, keys, head);
    addresses(rows[0].value, step, of->v, table, piece->from, keys, head);
    for (long i = 0, from = piece->from; from < piece->to; i ^= 1) {
        const long after = from + keys, more = piece->to - after < KEYS ? piece->to - after : KEYS;
        if (more > 0) {
            addresses(rows[!i].key, step, of->k, table, after, more, head);
            addresses(rows[!i].value, step, of->v, table, after, more, head);
        } else
            addresses(rows[!i].key, step, of->k, table, piece->from, keys, next);
        for (long j = more > 0 ? more : keys; j < KEYS; j++) rows[!i].key[j] = rows[i].key[0];
        tile_of_keys(s, step, rows + i, rows + !i, from, keys, columns, group, first);
        from = after;
        keys = more;
    }
    for (long c = 0; c < columns; c++) {
        const float *out = s->out + c * dim;
        if (piece->part >= 0) {
            float *part = call->parts + (piece->part * step->heads + h + c) * (step->dim + 2);
            part[0] = s->top[c];
            part[1] = s->sum[c];
            memcpy(part + 2, out, (size_t)step->dim * 4);
            continue;
        }
        float scale = s->sum[c] > 0 || s->sum[c] != s->sum[c] ? 1.0f / s->sum[c] : 0.0f;
        long to = ((begin + c / group) * step->heads + h + c % group) * step->dim;
        for (long d = 0; d < step->dim; d++) put_one(of->out, to + d, out[d] * scale, of->half_q);
    }
}

/* Joins the parts of one head of a row with one query token. */
static void join(const Call *call, const Piece *piece, long parts, long head) {
    const Step *step = call->step;
    const long stride = step->heads * (step->dim + 2);
    const float *first = call->parts + (piece->part * step->heads + head) * (step->dim + 2);
    float top = -INFINITY, sum = 0.0f, out[MAX_DIM] = {0};
    for (long i = 0; i < parts; i++) top = first[i * stride] > top ? first[i * stride] : top;
    for (long i = 0; i < parts; i++) {
        const float *part = first + i * stride;
        float weight = expf(part[0] - top);
        sum += weight * part[1];
        for (long d = 0; d < step->dim; d++) out[d] += weight * part[2 + d];
    }
    long to = (step->q_start[piece->row] * step->heads + head) * step->dim;
    for (long d = 0; d < step->dim; d++) put_one(call->of->out, to + d, out[d] / sum, call->of->half_q);
}

/* Lists the pieces of all rows; with `pieces` NULL only counts them. Adds the number of parts to *parts. */
static long list(const Step *s, Piece *pieces, long *parts) {
    const long group = s->heads / s->kv_heads, most = group < COLUMNS ? COLUMNS / group : 1;
    long count = 0;
    for (int32_t row = 0; row < s->rows; row++) {
        long queries = s->q_start[row + 1] - s->q_start[row], past = s->seq_lens[row] - queries;
        for (long first = 0; first < queries; first += most) {
            long tokens = queries - first < most ? queries - first : most;
            long low = s->window ? past + first - s->window + 1 : 0, end = past + first + tokens;
            low = low < 0 ? 0 : low;
            long size = queries == 1 && end - low > PART ? PART : end - low;
            if (size <= 0) size = 1, end = low + (end > low);
            for (long from = low; from == low || from < end; from += size) {
                long to = from + size < end ? from + size : end;
                if (pieces)
                    pieces[count] = (Piece){row, (int32_t)first, (int32_t)tokens, (int32_t)from, (int32_t)to,
                                            end - low > size ? *parts : -1};
                *parts += end - low > size;
                count++;
            }
        }
    }
    return count;
}

/* How the work is cut follows from the rows' lengths as they are in memory now. */
EXPORT int attention(Team *team, const void *arguments) {
    const Attention *of = arguments;
    const Step *step = &of->step;
    long parts = 0;
    const long pieces = list(step, NULL, &parts), group = step->heads / step->kv_heads;
    const long listed = (pieces * (long)sizeof(Piece) + 63) / 64 * 64;
    char *memory = team_memory(team, listed + parts * step->heads * (step->dim + 2) * 4);
    if (!memory) return pieces > 0;
    Piece *piece = (Piece *)memory;
    const Call call = {step, of, (float *)(memory + listed)};
#pragma omp single
    list(step, piece, &(long){0});
    Scratch scratch;
    const long together = pieces >= MANY ? step->kv_heads : 1;
#pragma omp for schedule(dynamic, together)
    for (long i = 0; i < pieces * step->kv_heads; i++) {
        const long head = i % step->kv_heads, next = head + 1 < step->kv_heads ? head + 1 : head;
        for (long h = 0; h < group; h += COLUMNS) {
            const long count = group - h < COLUMNS ? group - h : COLUMNS;
            attend(&scratch, &call, piece + i / step->kv_heads, head, head * group + h, count, next);
        }
    }
    if (!parts) return 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (long i = 0; i < pieces; i++) {
        if (piece[i].part < 0 || (i && piece[i - 1].part >= 0 && piece[i - 1].row == piece[i].row)) continue;
        long last = i;
        while (last < pieces && piece[last].part >= 0 && piece[last].row == piece[i].row) last++;
        for (long head = 0; head < step->heads; head++) join(&call, piece + i, last - i, head);
    }
    return 0;
}
