/* The calling convention of kernels: `int name(Team *team, const void *arguments)`, nonzero for no memory.
 *
 * All threads of the team that run.c has made call the kernel, with the same arguments, a record that a ctypes Structure
 * mirrors. Work is shared by OpenMP directives that stand outside any parallel region of the kernel's own (`omp for`,
 * `omp single`). A barrier follows every kernel, so the last of its loops needs none.
 */
#ifndef OCTAVO_TEAM_H
#define OCTAVO_TEAM_H

#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    void *memory;
    int64_t size;
} Arena;

typedef struct {
    Arena *arena;  /* the team's */
    Arena current; /* what this thread knows of it */
} Team;

/* `bytes` of memory for the kernel, which asks once, with the same number in every thread; NULL for all if there is none.
 * Threads wait for each other only where memory has to grow, which each sees from its own copy of the size.
 */
static inline void *team_memory(Team *team, int64_t bytes) {
    if (bytes > team->current.size) {
#pragma omp single
        {
            free(team->arena->memory);
            team->arena->memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
            team->arena->size = team->arena->memory ? bytes : 0;
        }
        team->current = *team->arena;
    }
    return bytes > team->current.size ? NULL : team->current.memory;
}

#endif
