/* Runs kernels one after another, all on one team of threads: the only parallel region, the only entry. */
#define _GNU_SOURCE
#include "team.h"

#if defined(__linux__) && defined(_OPENMP)
#include <omp.h>
#include <sched.h>
#endif

#define KEPT (64L << 20) /* bytes of memory that stay for the next call */

typedef struct {
    int (*kernel)(Team *team, const void *arguments);
    const void *arguments;
} Call;

/* Each call sees the memory that those before it wrote. `alone`: on the calling thread. Returns 0, or 1 if a kernel had
 * no memory.
 */
EXPORT int run(const Call *calls, int64_t count, int alone) {
    static _Thread_local Arena kept;
    const Arena before = kept;
    Arena arena = before;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (!alone)
    {
        Team team = {&arena, before};
        for (int64_t i = 0; i < count; i++) {
            failed |= calls[i].kernel(&team, calls[i].arguments);
#pragma omp barrier
        }
    }
    if (arena.size > KEPT) {
        free(arena.memory);
        arena = (Arena){0};
    }
    kept = arena;
    return failed;
}

/* Ties thread i of the calling thread's teams to processor cpus[i], but for the calling thread itself. Returns how many
 * were tied.
 */
EXPORT int pin(const int32_t *cpus, int64_t count) {
    int tied = 0;
#if defined(__linux__) && defined(_OPENMP)
#pragma omp parallel num_threads((int)count) reduction(+ : tied)
    if (omp_get_thread_num() > 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpus[omp_get_thread_num()], &one);
        tied = sched_setaffinity(0, sizeof one, &one) == 0;
    }
#else
    (void)cpus, (void)count;
#endif
    return tied;
}
