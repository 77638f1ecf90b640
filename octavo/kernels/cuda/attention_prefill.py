"""Causal attention of rows with several query tokens over the paged cache (FlashAttention-2's order, arXiv:2307.08691).

A program owns the queries of `BLOCK_M // GROUP` consecutive tokens of one row for the GROUP heads that share a KV head,
packed as the rows of one matrix, and walks the keys that they see in blocks: first those that every query sees, without
masks, then the rest. Scores live in base 2 (s log2(e)), sums and outputs in float32. Works with and without cached
tokens before the queries, and with a sliding window; keys outside the visible range are never loaded.

Programs come from a list of (row, first token) pairs with the longest walk first, so that the card does not wait for a
long row at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.cuda.launch import LOG2E, kernel, pow2

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class PrefillConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config(max_q: int, group: int, dim: int) -> PrefillConfig:
    """The launch for rows of at most max_q query tokens. block_m is at least `group`."""
    if max_q * group <= 64:
        return PrefillConfig(max(64, pow2(group)), 64, 4, 3)
    return PrefillConfig(max(128, pow2(group)), 64 if dim > 64 else 128, 8, 3)


def tiles(rows: NDArray[Any], q_lens: Ints, kv_lens: Ints, tokens: int) -> Ints:
    """(row, first token) of every program [N, 2], longest walk first; tokens: query tokens of a program.

    rows [n] are batch rows (any integers); q_lens and kv_lens [n] are theirs.
    """
    counts = -(-q_lens // tokens)
    ends = np.cumsum(counts)
    first = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)) * tokens
    walk = np.repeat(kv_lens - q_lens, counts) + first
    order = np.argsort(-walk, kind="stable")
    return np.stack((np.repeat(rows, counts), first), 1)[order].astype(np.int32)


@kernel()
def _walk(
    query: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """Takes keys begin..end into (top, total, acc). MASKED: only keys first..last exist, each query sees its own."""
    n_at = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        at = start + n_at
        if MASKED:
            real = (at >= first) & (at < last)
            block = tl.load(table + at // PAGE, mask=real, other=0).to(tl.int64)
        else:
            block = tl.load(table + at // PAGE).to(tl.int64)
        where = (block * BLOCK_STRIDE + at % PAGE * SLOT_STRIDE)[:, None]
        key = tl.load(k_cache + where, mask=real[:, None], other=0.0) if MASKED else tl.load(k_cache + where)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            seen = real[None, :] & (at[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = new_top
        if MASKED and WINDOW:  # a query may see nothing of the first blocks
            shift = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = tl.exp2(scores * scale - shift[:, None])
        kept = tl.exp2(top - shift)
        value = tl.load(v_cache + where, mask=real[:, None], other=0.0) if MASKED else tl.load(v_cache + where)
        total = total * kept + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * kept[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@kernel("table_stride")
def _prefill(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    q_start: tl.tensor,
    seq_lens: tl.tensor,
    programs: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(programs + 2 * tl.program_id(1))
    first_token = tl.load(programs + 2 * tl.program_id(1) + 1)
    q_begin = tl.load(q_start + row)
    q_len = tl.load(q_start + row + 1) - q_begin
    kv_len = tl.load(seq_lens + row)
    line = tl.load(rows + row).to(tl.int64) if HAS_ROWS else row.to(tl.int64)
    table += line * table_stride

    tokens: tl.constexpr = BLOCK_M // GROUP
    m_at, d_at = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    token = first_token + m_at // GROUP
    real = (token < q_len) & (m_at < tokens * GROUP)
    head_of = head * GROUP + m_at % GROUP
    at_token = (q_begin + token).to(tl.int64)
    query = tl.load(q + (at_token * q_stride + head_of * DIM)[:, None] + d_at[None, :], mask=real[:, None], other=0.0)
    cached = kv_len - q_len
    position = cached + tl.minimum(token, q_len - 1)
    last = tl.minimum(cached + first_token + tokens, kv_len)
    k_cache += head * HEAD_STRIDE + d_at[None, :]
    v_cache += head * HEAD_STRIDE + d_at[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    if WINDOW:
        first = tl.maximum(cached + first_token - WINDOW + 1, 0)
        begin = first // PAGE * PAGE
    else:
        first = 0
        begin = (cached + first_token + 1) // BLOCK_N * BLOCK_N
        top, total, acc = _walk(
            query, top, total, acc, k_cache, v_cache, table, position, 0, begin, 0, begin, scale,
            PAGE, BLOCK_STRIDE, SLOT_STRIDE, WINDOW, BLOCK_N, False,
        )  # fmt: skip
    top, total, acc = _walk(
        query, top, total, acc, k_cache, v_cache, table, position, begin, last, first, last, scale,
        PAGE, BLOCK_STRIDE, SLOT_STRIDE, WINDOW, BLOCK_N, True,
    )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + ((at_token * kv_heads * GROUP + head_of) * DIM)[:, None] + d_at[None, :],
        acc.to(out.dtype.element_ty),
        mask=real[:, None],
    )


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor | None,
    q_start: Tensor,
    seq_lens: Tensor,
    programs: Tensor,
    out: Tensor,
    launch: PrefillConfig,
    *,
    scale: float,
    window: int | None = None,
    pdl: bool = False,
) -> Tensor:
    """Causal attention of the rows that `programs` names; writes their tokens of out [T, heads, dim] and returns it.

    q [T, heads, dim] with contiguous heads; caches [blocks, page, kv_heads, dim] of any strides with contiguous dim;
    table int32 [lines, max_blocks]; batch row b reads table line rows[b] (line b where rows is None), its tokens are
    q_start[b]..q_start[b + 1], the last of seq_lens[b] tokens whose keys are cached. `programs` int32 [N, 2] is what
    `tiles` made for `launch.block_m // group` tokens a program.
    """
    page, kv_heads, dim = k_cache.shape[1:]
    assert k_cache.stride() == v_cache.stride()
    assert out.is_contiguous()
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _prefill[(kv_heads, programs.shape[0])](
        q,
        k_cache,
        v_cache,
        table,
        table if rows is None else rows,
        q_start,
        seq_lens,
        programs,
        out,
        scale * LOG2E,
        q.stride(0),
        table.stride(0),
        q.shape[1] // kv_heads,
        dim,
        page,
        *k_cache.stride()[:3],
        window or 0,
        rows is not None,
        launch.block_m,
        launch.block_n,
        pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **extra,
    )
    return out


def upload(array: Ints, device: torch.device) -> Tensor:
    """A small host array on the device, without waiting for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)
