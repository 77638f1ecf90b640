"""Sums over ranks of rows that lie in memory which their GPUs map from each other, and what follows: add and RMSNorm.

Every rank puts its rows where the others can read them, tells them, waits for them, and adds all ranks' rows in rank
order in float32, so that every rank gets the same bits. Program p has rows p, p + PROGRAMS, ... and talks with the
programs p of the other ranks alone, so small batches wait for little and large ones for nobody's last row.

A program counts its calls. What it tells is that number, which never falls, so one telling a call is enough: rows go
to one of two halves by turns, and a rank can begin a call only when the others are through with the call before the
one before. This needs rows of one width, so that a row belongs to the same program in all calls, and all ranks making
the same calls.

Owns no memory: `parallel.peer_memory` maps it.
"""

# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels.cuda.launch import kernel, pdl, pow2

PROGRAMS = 256
"""At most so many at a time, few enough that all of them run at once, which waiting for each other needs."""


@kernel()
def _number_at(address: tl.tensor) -> tl.tensor:
    """The number that lies there; each thread that reads it sees what was written before it was."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@kernel()
def _rows(address: tl.tensor, x: tl.tensor) -> tl.tensor:
    return tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)


@kernel("num_rows")
def _sum_rows(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    shared: tl.tensor,
    told: tl.tensor,
    calls: tl.tensor,
    num_rows: tl.tensor,
    half: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """shared, told: addresses of each rank's rows [2, half] and what others told it [RANKS, PROGRAMS] int64."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    if NORM:
        gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    call = tl.load(calls + program) + 1
    begin = call % 2 * half
    for row in range(program, num_rows, tl.num_programs(0)):
        place = row.to(tl.int64) * size + at
        tl.store(_rows(shared[RANK], x) + begin + place, tl.load(x + place, mask=inside), mask=inside)
    tl.debug_barrier()
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            word = told[rank].to(tl.pointer_type(tl.int64)) + RANK * PROGRAMS + program
            tl.atomic_xchg(word, call, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            address = told[RANK] + (rank * PROGRAMS + program) * 8
            seen = _number_at(address)
            while seen < call:
                seen = _number_at(address)
    tl.store(calls + program, call)
    for row in range(program, num_rows, tl.num_programs(0)):
        place = row.to(tl.int64) * size + at
        value = tl.zeros((BLOCK,), tl.float32)
        for rank in tl.static_range(RANKS):
            rows = x if rank == RANK else _rows(shared[rank], x) + begin
            part = tl.load(rows + place, mask=inside, other=0.0)
            value += part.to(tl.float32)
        if NORM:
            value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
            value *= tl.rsqrt(tl.sum(value * value, 0) / size + eps) * gain
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def sum_rows(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    *,
    rank: int,
    shared: Sequence[int],
    told: Sequence[int],
    half: int,
    calls: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum s of all ranks' x [T, n], twice; with norm = (residual [T, n], weight [n], eps) as `add_rms_norm` of it.

    x and residual are contiguous. Of each rank, in order, the addresses at which are mapped here: `shared` [2, half] of
    x's dtype, half >= T * n, and `told` [ranks, PROGRAMS] int64. `calls` [PROGRAMS] int64 is this rank's own. All began
    as zeros.
    """
    rows, size = x.shape
    residual, weight, eps = (x, x, 0.0) if norm is None else norm
    y = torch.empty_like(x)
    total = y if norm is None else torch.empty_like(x)
    dependent = pdl()
    _sum_rows[(min(rows, PROGRAMS),)](
        x,
        residual,
        weight,
        y,
        total,
        tuple(shared),
        tuple(told),
        calls,
        rows,
        half,
        size,
        eps,
        RANK=rank,
        RANKS=len(shared),
        PROGRAMS=PROGRAMS,
        BLOCK=pow2(size),
        NORM=norm is not None,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=min(16, max(1, pow2(size) // 256)),
    )
    return y, total
