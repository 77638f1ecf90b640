/* The draw of `reference_sampling.sample` for all rows in one call, without a sort.
 *
 * With z = (logit - highest) / temperature, every filter keeps the tokens with z at least some threshold. top_k and
 * top_p find theirs the same way: a histogram of z gives the bin in which enough tokens (or enough probability) have
 * come together, and a selection by partition finds the value inside that bin. The draw then adds Gumbel noise, whose
 * logarithms are computed only where a cheap upper bound says that the token could win.
 */
#include "common.h"
#include "team.h"

#define BINS 2048
#define PER_UNIT 64 /* bins for a unit of z; the last bin holds all that is lower */

typedef struct {
    uint32_t k0, k1;
} Keys;

/* Works on vectors and on single words. */
#define MIX(x)                              \
    do {                                    \
        x = (x ^ (x >> 16)) * 0x7feb352du;  \
        x = (x ^ (x >> 15)) * 0x846ca68bu;  \
        x ^= x >> 16;                       \
    } while (0)

static Keys keys_of(int64_t seed, int64_t position) {
    const uint32_t words[4] = {(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32), (uint32_t)position,
                               (uint32_t)((uint64_t)position >> 32)};
    Keys keys = {0x9e3779b9u, 0x85ebca6bu};
    for (int i = 0; i < 4; i++) {
        keys.k0 ^= words[i];
        keys.k1 ^= words[i];
        MIX(keys.k0);
        MIX(keys.k1);
    }
    return keys;
}

/* 31 random bits for each of VL tokens. */
INLINE vi bits_of(Keys keys, vu token) {
    MIX(token);
    vu x = (token ^ keys.k0) * 0xcc9e2d51u;
    x ^= x >> 16;
    x = (x + keys.k1) * 0x1b873593u;
    return (vi)x ^ ((vi)x >> 15);
}

INLINE bool any(vi mask) {
#if VL == 16
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif VL == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < VL; i++) found |= mask[i];
    return found != 0;
#endif
}

INLINE float uniform_one(int32_t bits) {
    float u = (float)bits * 0x1p-31f + 0x1p-32f;
    return u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
}

/* At least the Gumbel noise: -log(-log1p(-u)) <= -log(u), and a float's bits give a lower bound of its log2. */
INLINE vf noise_bound(vi bits) {
    vf u = __builtin_convertvector(bits, vf) * 0x1p-31f + 0x1p-32f;
    return 88.0297f - __builtin_convertvector((vi)u, vf) * (0.69314718f * 0x1p-23f); /* 127 ln 2 and slack */
}

typedef struct {
    float score;
    long token;
} Winner;

/* The better of `best` and tokens [at, at + n), of which z[i] >= lowest take part. */
INLINE Winner draw_step(Winner best, Keys keys, vf z, float lowest, long at, long n, vu lanes) {
    if (!any(z >= lowest)) return best;
    vi bits = bits_of(keys, lanes + (uint32_t)at);
    if (!any((z + noise_bound(bits) > best.score) & (z >= lowest))) return best;
    for (long i = 0; i < n; i++) {
        if (!(z[i] >= lowest)) continue;
        float score = z[i] - logf(-log1pf(-uniform_one(bits[i])));
        if (score > best.score) best = (Winner){score, at + i};
    }
    return best;
}

/* The token drawn among those with z >= lowest. `row` holds logits if `raw`, else z; `fallback` if none can win. */
INLINE long draw(const float *row, long vocab, float top, float temperature, float lowest, Keys keys, long fallback,
                 bool raw) {
    Winner best = {-INFINITY, fallback};
    vu lanes;
    for (int i = 0; i < VL; i++) lanes[i] = (uint32_t)i;
    long i = 0;
    for (; i + VL <= vocab; i += VL) {
        vf z = load(row + i);
        best = draw_step(best, keys, raw ? (z - top) / temperature : z, lowest, i, VL, lanes);
    }
    if (i < vocab) {
        vf z = load_some(row + i, vocab - i);
        best = draw_step(best, keys, raw ? (z - top) / temperature : z, lowest, i, vocab - i, lanes);
    }
    return best.token;
}

INLINE int bin_of(float z) {
    float place = z * -(float)PER_UNIT;
    return place >= 0.0f && place < (float)(BINS - 1) ? (int)place : BINS - 1;
}

INLINE double weight_of(float z, bool probability) { return probability ? exp((double)z) : 1.0; }

/* Of n values the last, from the highest down, before which less than `share` has come together, `before` being there
 * already. Reorders the values.
 */
static float select_value(float *value, long n, double before, double share, bool probability) {
    float found = -INFINITY;
    while (n > 0) {
        float a = value[0], b = value[n / 2], c = value[n - 1];
        float pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        long higher = 0, end = n;
        double above = 0.0, equal = 0.0;
        for (long i = 0; i < end;) {
            float now = value[i];
            if (now > pivot) {
                above += weight_of(now, probability);
                value[i++] = value[higher];
                value[higher++] = now;
            } else if (now < pivot) {
                value[i] = value[--end];
                value[end] = now;
            } else {
                equal += weight_of(now, probability);
                i++;
            }
        }
        if (before + above >= share && higher > 0) {
            n = higher;
            continue;
        }
        found = pivot;
        before += above + equal;
        if (before >= share) return found;
        value += end;
        n -= end;
    }
    return found;
}

/* The lowest z of the most likely tokens, equals included, before each of which tokens not below `lowest` hold less
 * than `share`: of probability in units of exp(z), or of their number. With `relative`, share is a part of the total.
 */
static float threshold(const float *z, long vocab, float lowest, double share, bool probability, bool relative,
                       float *scratch) {
    double mass[BINS] = {0}, before = 0.0;
    for (long i = 0; i < vocab; i += VL) {
        long n = vocab - i < VL ? vocab - i : VL;
        vf now = n < VL ? load_some(z + i, n) : load(z + i);
        if (!any(now >= lowest)) continue;
        vf weight = probability ? exp_of(now) : splat(1.0f);
        for (long j = 0; j < n; j++)
            if (now[j] >= lowest) mass[bin_of(now[j])] += weight[j];
    }
    if (relative) {
        double total = 0.0;
        for (int bin = 0; bin < BINS; bin++) total += mass[bin];
        share *= total;
    }
    if (!(share > 0.0)) return 0.0f;
    int bin = 0;
    while (bin < BINS - 1 && before + mass[bin] < share) before += mass[bin++];
    const float first = (1.0f - (float)bin) / PER_UNIT; /* z of the bin lie between these, with room for rounding */
    const float last = bin == BINS - 1 ? -INFINITY : -((float)bin + 2.0f) / PER_UNIT;
    long count = 0;
    for (long i = 0; i < vocab; i += VL) {
        long n = vocab - i < VL ? vocab - i : VL;
        vf now = n < VL ? load_some(z + i, n) : load(z + i);
        if (!any((now >= last) & (now <= first) & (now >= lowest))) continue;
        for (long j = 0; j < n; j++)
            if (now[j] >= lowest && bin_of(now[j]) == bin) scratch[count++] = now[j];
    }
    float found = select_value(scratch, count, before, share, probability);
    return found > lowest ? found : lowest;
}

static long highest(const float *row, long vocab) {
    vf best[4];
    for (int j = 0; j < 4; j++) best[j] = splat(-INFINITY);
    long i = 0;
    for (; i + 4 * VL <= vocab; i += 4 * VL)
        UNROLL for (int j = 0; j < 4; j++) best[j] = larger(load(row + i + j * VL), best[j]);
    float top = largest_of(larger(larger(best[0], best[1]), larger(best[2], best[3])));
    for (; i < vocab; i++) top = row[i] > top ? row[i] : top;
    for (i = 0; i + 4 * VL <= vocab; i += 4 * VL) {
        vi found = load(row + i) == top;
        UNROLL for (int j = 1; j < 4; j++) found |= load(row + i + j * VL) == top;
        if (any(found)) break;
    }
    for (; i < vocab; i++)
        if (row[i] == top) return i;
    return 0;
}

typedef struct {
    const void *logits; /* rows of [vocab] floats or bfloat16, `stride` elements apart */
    const float *temperature, *top_p, *min_p;
    const int32_t *top_k;
    const int64_t *seed;
    const int64_t *position; /* [rows] */
    const int64_t *lines;    /* [rows] where in the other parameters a row's are; NULL: at its own index */
    int64_t *last_token;     /* NULL, or gets a row's token at its line */
    int64_t *tokens;         /* [rows] */
    int64_t rows, vocab, stride, half;
} Sampling;

/* The token of a row of logits; `z` is room for twice as many. */
static long sample_row(const Sampling *s, long row, const float *logits, float *z) {
    const long vocab = s->vocab, best = highest(logits, vocab), line = s->lines ? s->lines[row] : row;
    const float temperature = s->temperature[line], top = logits[best];
    if (!(temperature > 0.0f)) return best;
    const Keys keys = keys_of(s->seed[line], s->position[row]);
    const int32_t k = s->top_k[line];
    const bool limited = k > 0 && k < vocab, nucleus = s->top_p[line] < 1.0f;
    float lowest = s->min_p[line] > 0.0f ? logf(s->min_p[line]) : -INFINITY;
    if (!limited && !nucleus) return draw(logits, vocab, top, temperature, lowest, keys, best, true);
    float *scratch = z + vocab;
    long i = 0;
    for (; i + VL <= vocab; i += VL) store(z + i, (load(logits + i) - top) / temperature);
    for (; i < vocab; i++) z[i] = (logits[i] - top) / temperature;
    if (limited) {
        float kth = threshold(z, vocab, -INFINITY, k, false, false, scratch);
        lowest = kth > lowest ? kth : lowest;
    }
    if (nucleus) lowest = threshold(z, vocab, lowest, s->top_p[line], true, true, scratch);
    return draw(z, vocab, top, temperature, lowest, keys, best, false);
}

EXPORT int sample(Team *team, const void *arguments) {
    (void)team;
    const Sampling *s = arguments;
    const long vocab = s->vocab;
    int failed = 0;
#pragma omp for schedule(dynamic, 1)
    for (long row = 0; row < s->rows; row++) {
        float *memory = borrow(12 * vocab);
        failed |= !memory;
        if (!memory) continue;
        const float *logits = (const float *)s->logits + row * s->stride;
        if (s->half) {
            widen_row(memory, (const bf16 *)s->logits + row * s->stride, vocab);
            logits = memory;
        }
        s->tokens[row] = sample_row(s, row, logits, memory + vocab);
        give_back(memory, 12 * vocab);
    }
#pragma omp single nowait
    for (long row = 0; s->last_token && row < s->rows; row++)
        s->last_token[s->lines ? s->lines[row] : row] = s->tokens[row];
    return failed;
}

typedef struct {
    uint32_t *logits;     /* rows of [vocab] floats, `stride` apart */
    const int64_t *at;    /* [rows] of logits */
    const uint32_t *bits; /* [rows][words] */
    int64_t rows, vocab, stride, words;
} Masking;

/* Leaves those of n <= 32 logits whose bit is set; whether one above -inf is among them. */
INLINE bool mask_word(uint32_t *logits, uint32_t word, long n) {
    const uint32_t none = 0xff800000u; /* -inf */
    uint32_t some = 0;
    for (long i = 0; i < n; i++) {
        const uint32_t keep = -(word >> i & 1u), kept = (logits[i] & keep) | (none & ~keep);
        logits[i] = kept;
        some |= kept ^ none;
    }
    return some != 0;
}

EXPORT int apply_masks(Team *team, const void *arguments) {
    (void)team;
    const Masking *m = arguments;
    const long whole = m->vocab / 32;
#pragma omp for schedule(static)
    for (long row = 0; row < m->rows; row++) {
        uint32_t *logits = m->logits + m->at[row] * m->stride;
        const uint32_t *bits = m->bits + row * m->words;
        bool left = false;
        for (long w = 0; w < whole; w++) left |= mask_word(logits + 32 * w, bits[w], 32);
        if (m->vocab % 32) left |= mask_word(logits + 32 * whole, bits[whole], m->vocab % 32);
        for (long i = 0; !left && i < m->vocab; i++)
            if (bits[i / 32] >> (i % 32) & 1) logits[i] = 0;
    }
    return 0;
}
