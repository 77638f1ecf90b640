"""Attention of one query token a row over the paged cache, split over the keys (flash decoding, arXiv:2311.01282).

A program owns one row, one KV head and one span of the row's keys. The query heads that share the KV head are the rows
of a matrix padded to 16, so both products run on tensor cores. With scores s = q k^T * scale, a program keeps the
running maximum m, sum l = sum 2^(s' - m) and o = sum 2^(s' - m) v, where s' = s log2(e). Spans are merged exactly:
o = sum_i 2^(L_i - L) o_i / l_i with L_i = m_i + log2(l_i), either by a second small kernel or by the program of a row
that arrives last.

The grid's split count comes from host bounds; how many keys a program takes is computed from `seq_lens` on the device,
so a captured graph stays right while rows grow. A program whose span would begin beyond its row exits at once. Keys
outside a row's visible range are never loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels.cuda.launch import cdiv, kernel, pow2

LOG2E = 1.4426950408889634
PROGRAMS = 512


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode is launched; `splits` is the most spans of a row, `fused` lets the last arriving program merge."""

    block_n: int
    num_warps: int
    num_stages: int
    splits: int
    fused: bool


def config(rows: int, kv_heads: int, group: int, dim: int, max_kv: int) -> DecodeConfig:
    """The launch for a shape class; every value depends on host bounds alone, so a captured graph keeps its own.

    `PROGRAMS` fill 132 multiprocessors several times over; spans shorter than a block are useless. Small programs that
    merge their spans themselves are fastest while spans are split, larger ones where there is nothing to split
    (measured at 1 to 1,024 rows of 8 KV heads, even and uneven lengths; on spans of fixed length nothing was gained).
    """
    pairs = rows * kv_heads
    few = pairs < PROGRAMS
    block_n = 32 if few else 64
    splits = min(pow2(cdiv(PROGRAMS, pairs)), pow2(cdiv(max_kv, block_n)), 64)
    return DecodeConfig(block_n, 2 if few else 4, 5 if few else 3, splits, fused=few)


@kernel()
def _merge(
    partial: tl.tensor,
    stats: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    active: tl.tensor,
    stride: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Merges the `active` spans of HEADS neighbouring heads beginning at row-and-head index `first` into out."""
    head = tl.arange(0, HEADS_PAD)
    d = tl.arange(0, DIM)
    at = tl.arange(0, CHUNK)
    top = tl.full([HEADS_PAD], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_PAD], tl.float32)
    acc = tl.zeros([HEADS_PAD, DIM], tl.float32)
    for begin in range(0, active, CHUNK):
        known = (head < HEADS)[:, None] & (begin + at < active)[None, :]
        index = (first + head)[:, None] * stride + (begin + at)[None, :]
        weight = tl.load(stats + index, mask=known, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(
            partial + index[:, :, None] * DIM + d[None, None, :],
            mask=known[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(weight, 1))
        new_top = tl.where(head < HEADS, new_top, 0.0)
        weight = tl.exp2(weight - new_top[:, None])
        kept = tl.exp2(top - new_top)
        acc = acc * kept[:, None] + tl.sum(value * weight[:, :, None], 1)
        total = total * kept + tl.sum(weight, 1)
        top = new_top
    total = tl.where(head < HEADS, total, 1.0)
    tl.store(
        out + (first + head)[:, None] * DIM + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=(head < HEADS)[:, None],
    )


@kernel()
def _span(
    length: tl.tensor,
    splits: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """The first visible key, the first key of span 0, the keys of a span, and how many spans hold keys."""
    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    begin = first // PAGE * PAGE
    size = tl.cdiv(tl.cdiv(length - begin, splits), PAGE) * PAGE
    size = tl.maximum(size, BLOCK_N)
    return first, begin, size, tl.maximum(tl.cdiv(length - begin, size), 1)


@kernel("table_stride")
def _decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrivals: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(0), tl.num_programs(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(seq_lens + row)
    first, begin, size, active = _span(length, splits, WINDOW, PAGE, BLOCK_N)
    if split >= active:
        return
    lo = begin + split * size
    hi = tl.minimum(lo + size, length)
    line = tl.load(rows + row).to(tl.int64) if HAS_ROWS else row.to(tl.int64)
    table += line * table_stride

    m_at, n_at, d_at = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    real = m_at < GROUP
    q += row.to(tl.int64) * q_stride + head * GROUP * DIM
    query = tl.load(q + m_at[:, None] * DIM + d_at[None, :], mask=real[:, None], other=0.0)
    k_cache += head * HEAD_STRIDE + d_at[None, :]
    v_cache += head * HEAD_STRIDE + d_at[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        at = start + n_at
        seen = at < hi
        if WINDOW:
            seen = seen & (at >= first)
        block = tl.load(table + at // PAGE, mask=seen, other=0).to(tl.int64)
        where = (block * BLOCK_STRIDE + at % PAGE * SLOT_STRIDE)[:, None]
        key = tl.load(k_cache + where, mask=seen[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - new_top[:, None])
        kept = tl.exp2(top - new_top)
        value = tl.load(v_cache + where, mask=seen[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        top = new_top
    total = tl.where(total > 0.0, total, 1.0)
    acc = acc / total[:, None]

    index = (row * kv_heads + head) * GROUP + m_at  # of row and query head
    if active == 1:
        tl.store(out + index[:, None] * DIM + d_at[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])
    else:
        stats = partial + tl.num_programs(1) * kv_heads * GROUP * splits * DIM
        piece = index * splits + split
        tl.store(partial + piece[:, None] * DIM + d_at[None, :], acc, mask=real[:, None])
        tl.store(stats + piece, top + tl.log2(total), mask=real)
        if FUSED:
            tl.debug_barrier()  # the whole program's stores come before its arrival
            arrival = arrivals + row * kv_heads + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == active - 1:
                tl.store(arrival, 0)
                _merge(
                    partial, stats, out, (row * kv_heads + head) * GROUP, active, splits, GROUP, GROUP_PAD, DIM, CHUNK
                )


@kernel("splits")
def _combine(
    partial: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    head, row = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _, _, _, active = _span(tl.load(seq_lens + row), splits, WINDOW, PAGE, BLOCK_N)
    if active > 1:
        stats = partial + tl.num_programs(1) * heads * splits * DIM
        _merge(partial, stats, out, row * heads + head, active, splits, 1, 1, DIM, CHUNK)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor | None,
    seq_lens: Tensor,
    out: Tensor,
    launch: DecodeConfig,
    *,
    scale: float,
    window: int | None = None,
    arrivals: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v over each row's last `window` keys (None: all) into out [B, heads, dim]; returns out.

    q [B, heads, dim] with contiguous heads (any stride of rows); caches [blocks, page, kv_heads, dim] of any strides
    with contiguous dim; table int32 [lines, max_blocks]; row b reads table line rows[b] (line b where rows is None);
    seq_lens [B] int32, 0 for a row that attends to nothing and gets zeros. With `launch.fused`, `arrivals` holds at
    least B * kv_heads int32 zeros, which are zero again afterwards.
    """
    num_rows, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    splits, block_n = launch.splits, launch.block_n
    fused = launch.fused and splits > 1
    assert k_cache.stride() == v_cache.stride()
    assert out.is_contiguous()
    partial = out
    if splits > 1:
        partial = torch.empty(num_rows * heads * splits * (dim + 1), dtype=torch.float32, device=q.device)
    if fused:
        assert arrivals is not None
        assert arrivals.numel() >= num_rows * kv_heads
    group_pad = pow2(group)
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _decode[(kv_heads, num_rows, splits)](
        q,
        k_cache,
        v_cache,
        table,
        table if rows is None else rows,
        seq_lens,
        out,
        partial,
        table if arrivals is None else arrivals,
        scale * LOG2E,
        q.stride(0),
        table.stride(0),
        group,
        group_pad,
        dim,
        page,
        *k_cache.stride()[:3],
        window or 0,
        rows is not None,
        fused,
        max(16, group_pad),
        block_n,
        max(1, 64 // group_pad),
        pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **extra,
    )
    if splits > 1 and not fused:
        _combine[(heads, num_rows)](
            partial, seq_lens, out, splits, dim, page, window or 0, block_n, 16, pdl, num_warps=4, **extra
        )
    return out
