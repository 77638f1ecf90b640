"""Products of a few rows with a matrix on tensor cores, bound by reading the matrix once.

y[m, n] = f(sum_k x[m, k] W[n, k] + b[n]), computed as W x^T so that the long side of the tile is the matrix's; f is the
identity or, with GATED, the SwiGLU of `linear_matvec`. Weights are streamed once (evict-first) through STAGES buffers;
before it waits for the kernel that computes x, a program asks for its first pieces to be brought to the L2 cache.

Short of programs, a sum over k is shared: by SPLIT programs, each of which leaves its part in `parts` and counts its
arrival; the last to arrive adds all parts in their order, so that the result does not depend on timing, and resets the
counter. Within a program by GROUPS groups of warps, which read disjoint columns of the tile: narrow tiles have too few
outputs to occupy all warps.
"""

from __future__ import annotations

import triton.language as tl

from octavo.kernels.cuda.launch import kernel
from octavo.kernels.cuda.linear_matvec import weight_rows


@kernel("num_rows")
def skinny(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    TRIGGER: tl.constexpr,
) -> None:
    """x [num_rows, K], weight [size, K], bias [size] -> y [num_rows, size or size / 2].

    With SPLIT > 1: parts [programs, SPLIT, BLOCK_N, ROWS] float32, arrivals [programs] int32, zero before and after.
    """
    SPAN: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    if PDL and TRIGGER == 0:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    begin = tl.program_id(1) * SPAN
    i = program * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = weight_rows(i, size, GATED)
    if BIAS:
        offset = tl.load(bias + rows).to(tl.float32)
    if PDL:
        _prefetch(weight + rows[:, None] * K, begin, K, BLOCK_K, min(STAGES, SPAN // BLOCK_K))
        tl.extra.cuda.gdc_wait()
        if TRIGGER == 1:
            tl.extra.cuda.gdc_launch_dependents()
    if GROUPS == 1:
        total = _multiply(x, weight + rows[:, None] * K, begin, SPAN, num_rows, K, ROWS, BLOCK_N, BLOCK_K, STAGES)
    else:
        total = _multiply_in_groups(
            x, weight + rows[None, :, None] * K, begin, SPAN, num_rows, K, ROWS, BLOCK_N, BLOCK_K, STAGES, GROUPS
        )
    if PDL and TRIGGER == 2:
        tl.extra.cuda.gdc_launch_dependents()
    last = True
    if SPLIT > 1:
        tile = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        parts += program.to(tl.int64) * (SPLIT * BLOCK_N * ROWS)
        tl.store(parts + tl.program_id(1) * (BLOCK_N * ROWS) + tile, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + program, 1, sem="acq_rel") == SPLIT - 1
        if last:
            total = tl.zeros((BLOCK_N, ROWS), tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(parts + part * (BLOCK_N * ROWS) + tile, cache_modifier=".cg")
            tl.store(arrivals + program, 0)
    if last:
        if BIAS:
            total += offset[:, None]
        _store(total, y, program, num_rows, size, ROWS, BLOCK_N, GATED)


@kernel()
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    begin: tl.tensor,
    span: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """W x^T over columns begin .. begin + SPAN -> [BLOCK_N, ROWS]; weight [BLOCK_N, 1] points to rows of W."""
    k = tl.arange(0, BLOCK_K)[None, :]
    m = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in tl.range(begin, min(begin + span, K), BLOCK_K, num_stages=STAGES):
        w, h = _piece(weight, x + m * K, start + k, m < num_rows, K, BLOCK_K)
        total = tl.dot(w, tl.trans(h), total, input_precision="ieee")
    return total


@kernel()
def _multiply_in_groups(
    x: tl.tensor,
    weight: tl.tensor,
    begin: tl.tensor,
    span: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """The same with the columns of each piece divided among groups; weight [1, BLOCK_N, 1]."""
    PART: tl.constexpr = BLOCK_K // GROUPS
    k = tl.arange(0, GROUPS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    m = tl.arange(0, ROWS)[None, :, None]
    total = tl.zeros((GROUPS, BLOCK_N, ROWS), tl.float32)
    for start in tl.range(begin, min(begin + span, K), BLOCK_K, num_stages=STAGES):
        w, h = _piece(weight, x + m * K, start + k, m < num_rows, K, BLOCK_K)
        total = tl.dot(w, tl.permute(h, (0, 2, 1)), total, input_precision="ieee")
    return tl.sum(total, 0)


@kernel()
def _piece(
    weight: tl.tensor, x: tl.tensor, k: tl.tensor, present: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Columns k of W and of the rows of x that exist; zero elsewhere, without reading."""
    if K % BLOCK_K == 0:
        w = tl.load(weight + k, eviction_policy="evict_first")
        h = tl.load(x + k, mask=present, other=0)
    else:
        w = tl.load(weight + k, mask=k < K, other=0, eviction_policy="evict_first")
        h = tl.load(x + k, mask=present & (k < K), other=0)
    return w, h


@kernel()
def _store(
    total: tl.tensor,
    y: tl.tensor,
    program: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    """Writes total [BLOCK_N, ROWS] to its columns of y."""
    total = tl.trans(total)
    if GATED:
        gate, up = tl.split(tl.reshape(total, (ROWS, BLOCK_N // 2, 2)))
        total = gate / (1 + tl.exp(-gate)) * up
        column = program * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = size // 2
    else:
        column = program * BLOCK_N + tl.arange(0, BLOCK_N)
        width = size
    m = tl.arange(0, ROWS)[:, None]
    mask = (column[None, :] < width) & (m < num_rows)
    tl.store(y + m * width + column[None, :], total.to(y.dtype.element_ty), mask=mask)


@kernel()
def _prefetch(
    weight: tl.tensor, begin: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr
) -> None:
    """Asks the L2 cache for the first PIECES pieces of the rows that weight [BLOCK_N, 1] points to."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, BLOCK_K // LINE)[None, :] * LINE
    for piece in tl.static_range(PIECES):
        at = weight + tl.minimum(begin + piece * BLOCK_K + k, K - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
