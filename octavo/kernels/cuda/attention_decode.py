"""Attention of one query token a row over the paged cache, split over the keys (flash decoding, arXiv:2311.01282).

A program owns one row, one KV head and one span of the row's keys. The query heads that share the KV head are the rows
of a matrix padded to 16, so both products run on tensor cores. With scores s = q k^T * scale, a program keeps the
running maximum m, sum l = sum 2^(s' - m) and o = sum 2^(s' - m) v, where s' = s log2(e). Spans are merged exactly:
o = sum_i 2^(L_i - L) o_i / l_i with L_i = m_i + log2(l_i), either by a second small kernel or by the program of a row
that arrives last.

The grid's split count comes from host bounds; how many keys a program takes is computed from `seq_lens` on the device,
so a captured graph stays right while rows grow. A program whose span would begin beyond its row exits at once. Keys
outside a row's visible range are never loaded.

`decode` can take the qkv product instead of queries. Every program then normalises and rotates its own query heads and
the row's newest key, one more row of that matrix; the one whose span ends the row writes that key and the newest value
to the cache before it reads its span. No other program reads that place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels.cuda.launch import LOG2E, cdiv, kernel, pow2
from octavo.kernels.cuda.rope import load_norms, load_turned

SPLIT_BELOW = 256
"""Pairs of a row and a KV head from which on rows are not split."""


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

    Short of programs for 132 multiprocessors, spans are split, in small programs that merge their spans themselves;
    spans shorter than a block are useless. With more, splitting costs more than it evens out, programs take larger
    blocks, and the more of them there are the fewer registers and buffers each gets (tools/gpu/attention.py
    measures 1 to 1,024 rows of 8 KV heads, of even and uneven lengths).
    """
    pairs = rows * kv_heads
    if pairs < SPLIT_BELOW:
        splits = min(pow2(cdiv(2 * SPLIT_BELOW, pairs)), pow2(cdiv(max_kv, 32)), 32)
        return DecodeConfig(32, 2, 5, splits, fused=True)
    warps = 4 if pairs < 16 * SPLIT_BELOW else 2
    return DecodeConfig(64, warps, 5 if pairs < 2 * SPLIT_BELOW and dim <= 128 else 3, 1, fused=False)


@dataclass(frozen=True)
class NewTokens:
    """What turns a qkv product of one token a row into queries, and keys and values in the cache."""

    slots: Tensor
    """[B] int64, block * page + offset: the place of position seq_len - 1 in the row's blocks."""
    rotation: tuple[Tensor, Tensor]
    """Cosines and sines, [B, 1, width] each and contiguous."""
    norms: tuple[Tensor, Tensor, float] | None
    """RMSNorm of each query and key head: weights [dim] of one dtype, and epsilon."""


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


@kernel()
def _attend(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """o, m and l of query [BLOCK_M, DIM] over keys lo to hi, of which those from `first` on are visible."""
    n_at = tl.arange(0, BLOCK_N)
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
    return acc / total[:, None], top, total


@kernel()
def _finish(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrivals: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    split: tl.tensor,
    active: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Stores a row's only span to out, one of several to partial; FUSED: the last to arrive merges them."""
    kv_heads, splits = tl.num_programs(0), tl.num_programs(2)
    m_at, d_at = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    real = m_at < GROUP
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


@kernel("table_stride")
def _decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    order: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrivals: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """With WIDTH, q is the qkv product and WIDTH of each head's dimensions are rotated."""
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(0)
    m_at, d_at = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    real, is_key = m_at < GROUP, m_at == GROUP
    k_cache += head * HEAD_STRIDE + d_at[None, :]
    v_cache += head * HEAD_STRIDE + d_at[None, :]
    if WIDTH:
        inside = (m_at <= GROUP)[:, None] & (d_at < DIM)[None, :]
        norms = load_norms(q_weight, k_weight, real, inside, WIDTH, DIM, NORM)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_ORDER:
        row = tl.load(order + row)
    token = row.to(tl.int64)
    length = tl.load(seq_lens + row)
    line = tl.load(rows + row).to(tl.int64) if HAS_ROWS else token
    q += token * q_stride
    if WIDTH:
        slot = tl.load(slots + row).to(tl.int64)
        value = tl.load(q + (kv_heads * (GROUP + 1) + head) * DIM + d_at)
        heads = tl.where(real, head * GROUP + m_at, kv_heads * GROUP + head)[:, None]
        turn = token * WIDTH
        _, turned = load_turned(q + heads * DIM, inside, norms, eps, cos + turn, sin + turn, DIM, WIDTH, DIM, NORM)
        query = turned.to(q.dtype.element_ty)
    else:
        query = tl.load(q + (head * GROUP + m_at)[:, None] * DIM + d_at[None, :], mask=real[:, None], other=0.0)

    first, begin, size, active = _span(length, tl.num_programs(2), WINDOW, PAGE, BLOCK_N)
    if split >= active:
        return
    if WIDTH and split == active - 1:
        place = slot // PAGE * BLOCK_STRIDE + slot % PAGE * SLOT_STRIDE
        at_key = tl.broadcast_to(k_cache + place, (BLOCK_M, DIM))
        tl.store(at_key, turned.to(k_cache.dtype.element_ty), mask=is_key[:, None] & inside)
        tl.store(v_cache + place, value[None, :].to(v_cache.dtype.element_ty))
        tl.debug_barrier()  # the program's own loads see them
    lo = begin + split * size
    acc, top, total = _attend(
        query, k_cache, v_cache, table + line * table_stride, first, lo, tl.minimum(lo + size, length), scale,
        DIM, PAGE, BLOCK_STRIDE, SLOT_STRIDE, WINDOW, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    _finish(
        acc, top, total, out, partial, arrivals, row, head, split, active, GROUP, GROUP_PAD, DIM, FUSED, BLOCK_M, CHUNK
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
    order: Tensor | None = None,
    arrivals: Tensor | None = None,
    new: NewTokens | None = None,
    pdl: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v over each row's last `window` keys (None: all) into out [B, heads, dim]; returns out.

    q [B, heads, dim] with contiguous heads (any stride of rows); caches [blocks, page, kv_heads, dim] of any strides
    with contiguous dim; table int32 [lines, max_blocks]; row b reads table line rows[b] (line b where rows is None);
    seq_lens [B] int32, 0 for a row that attends to nothing and gets zeros. order [B] int32: a permutation of the rows,
    in which their programs start, so that long rows first leave no long tail. With `launch.fused`, `arrivals` holds at
    least B * kv_heads int32 zeros, which are zero again afterwards.

    With `new`, q is the qkv product [B, (heads + 2 * kv_heads) * dim] of the caches' dtype, and its keys and values go
    to the cache first, all rounded as by `rope_norm_write_kv`.
    """
    num_rows, heads, dim = out.shape
    page, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    splits, block_n, fused = launch.splits, launch.block_n, launch.fused
    assert k_cache.stride() == v_cache.stride()
    assert out.is_contiguous()
    parts = num_rows * heads * splits * (dim + 1) if splits > 1 else 0
    partial = torch.empty(parts, dtype=torch.float32, device=q.device)
    if fused and splits > 1:
        assert arrivals is not None
        assert arrivals.numel() >= num_rows * kv_heads
    slots, (cos, sin), norms = (seq_lens, (out, out), None) if new is None else (new.slots, new.rotation, new.norms)
    q_weight, k_weight, eps = (out, out, 0.0) if norms is None else norms
    group_pad = pow2(group)
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _decode[(kv_heads, num_rows, splits)](
        q,
        k_cache,
        v_cache,
        table,
        table if rows is None else rows,
        seq_lens if order is None else order,
        seq_lens,
        out,
        partial,
        table if arrivals is None else arrivals,
        slots,
        cos,
        sin,
        q_weight,
        k_weight,
        eps,
        scale * LOG2E,
        q.stride(0),
        table.stride(0),
        group,
        group_pad,
        dim,
        0 if new is None else cos.shape[-1],
        page,
        *k_cache.stride()[:3],
        window or 0,
        norms is not None,
        rows is not None,
        order is not None,
        fused,
        max(16, pow2(group + 1)),  # the new key is a row, too; without one the same, for the same sums
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
