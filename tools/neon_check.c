/* Checks the products of octavo/kernels/cpu on another processor, without Python: see neon_check.sh.
 *
 * Each result is compared with sums in double precision over the weights as floats. Prints the largest error of each format
 * relative to the sum of magnitudes, and exits with the number of formats beyond their bound.
 */
#ifdef CHECK_FLOATS
#include "linear_float.c"
#else
#include "quant_formats.c"
#include "quant_linear.c"
#endif

#include <stdio.h>

enum { TOKENS_OF = 71, IN = 320, OUT = 48 };

static float uniform(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1;
}

static float x[TOKENS_OF * IN], w[OUT * IN], y[TOKENS_OF * OUT];
static const long counts[] = {1, 2, 3, 7, 64, TOKENS_OF};

/* Largest error of y. */
static double worst(long tokens) {
    double most = 0;
    for (long t = 0; t < tokens; t++)
        for (long o = 0; o < OUT; o++) {
            double sum = 0, size = 0;
            for (long i = 0; i < IN; i++) {
                const double product = (double)x[t * IN + i] * w[o * IN + i];
                sum += product, size += fabs(product);
            }
            const double error = fabs(y[t * OUT + o] - sum) / size;
            if (!(error <= most)) most = error;
        }
    return most;
}

static int report(const char *name, double error, double bound) {
    printf("%-12s relative error %.2e, at most %.0e\n", name, error, bound);
    return !(error <= bound);
}

#ifdef CHECK_FLOATS
static int check(Team *team) {
    static uint16_t halves[OUT * IN];
    int bad = 0;
    for (int half = 0; half < 2; half++) {
        double most = 0;
        for (long i = 0; i < OUT * IN; i++) {
            w[i] = uniform();
            halves[i] = narrow_one(w[i]);
            if (half) w[i] = widen_one(halves[i]);
        }
        for (unsigned n = 0; n < sizeof counts / sizeof *counts; n++) {
            const Linear a = {.x = x, .w = half ? (void *)halves : w, .y = y, .stride = IN, .tokens = counts[n],
                              .in = IN, .out = OUT, .half_w = half};
            bad += linear(team, &a);
            most = fmax(most, worst(counts[n]));
        }
        bad += report(half ? "bfloat16" : "float32", most, 1e-6);
    }
    return bad;
}
#else
static int check(Team *team) {
    static const char *const names[] = {"q4", "q4_min", "q6", "q6_min", "q6_16", "q8"};
    static uint8_t packed[OUT * IN * 2];
    int64_t index[OUT];
    int bad = 0;
    for (long i = 0; i < OUT; i++) index[i] = i;
    for (long f = 0; f < 6; f++) {
        const struct format of = formats[f];
        const long bytes = block_bytes(of.bits, of.group, of.has_min);
        double most = 0;
        for (long b = 0; b < OUT / PANEL * IN / COLUMNS; b++) {
            uint8_t *block = packed + b * bytes;
            for (long i = 0; i < bytes; i++) block[i] = (uint8_t)(128 * uniform() + 128);
            for (long i = 64 * of.bits + 1; i < bytes; i += 2) block[i] = 0x1c | (block[i] & 0x83); /* about 1 / 200 */
        }
        const struct gather g = {.weight = packed, .index = index, .out = w, .format = f, .columns = IN, .count = OUT};
        bad += octavo_quant_rows(team, &g);
        for (unsigned n = 0; n < sizeof counts / sizeof *counts; n++) {
            const struct product p = {.x = x, .weight = packed, .out = y, .multiply = multiplies[f],
                                      .rows = counts[n], .columns = IN, .format = f, .outs = OUT, .stride = OUT};
            bad += octavo_quant_linear(team, &p);
            most = fmax(most, worst(counts[n]));
        }
        bad += report(names[f], most, 4e-3);
    }
    return bad;
}
#endif

int main(void) {
    Arena arena = {0};
    Team team = {&arena, arena};
    for (long i = 0; i < TOKENS_OF * IN; i++) x[i] = uniform() * (i % IN == 5 ? 40 : 1);
    return check(&team);
}
