"""Causal attention of long rows on dense keys and values through cuDNN, which torch carries.

A row's keys and values are first gathered from their pages (2 bytes read and written for each, a few percent of the
attention at 4,096 tokens and less beyond). cuDNN makes a plan for every new shape and knows causal masks only for as
many queries as keys, so lengths are padded to multiples of `ROUND` and cached tokens are split off: with P cached
and Q new tokens, keys 0..P0 (P0 = P rounded down to a multiple of `ROUND_CACHED`) are seen by every query, and the rest
is a causal square. The two results merge exactly by their log-sums: o = (2^a o_a + 2^b o_b) / (2^a + 2^b). Padded keys
are zeros behind every real query; padded queries are computed and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels.cuda.launch import cdiv, kernel, pow2

WAY = "cudnn"
"""What takes the dense rows: cudnn, or hopper (`attention_hopper`: compute capability 9.0, no padding, no splits)."""
ROUND = 512
ROUND_CACHED = 1024
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class DenseRows:
    """`count` neighbouring batch rows from `row` on, of `q_len` tokens each with `cached` tokens before them.

    Their tokens begin at `token` of the batch. More than one row only where nothing is cached.
    """

    row: int
    count: int
    token: int
    q_len: int
    cached: int


def wanted(q_len: int, kv_len: int, window: int | None, dtype: torch.dtype, dim: int) -> bool:
    """Whether a row is worth gathering and padding for; the rule was set by measurement (tools/gpu/attention.py)."""
    whole = window is None or window >= kv_len
    return whole and q_len >= 2048 and dim in (64, 128) and dtype in (torch.bfloat16, torch.float16)


@kernel("first_row", "table_stride", "length")
def _gather(
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    first_row: tl.tensor,
    table_stride: tl.tensor,
    length: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """BLOCK_T tokens of one row into out [2, count, length, KV_HEADS * DIM]: keys, then values; zeros at the end."""
    piece, count = tl.program_id(1), tl.num_programs(1)
    row = first_row + piece
    line = tl.load(rows + row).to(tl.int64) if HAS_ROWS else row.to(tl.int64)
    at = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_C)
    real = at < tl.load(seq_lens + row)
    block = tl.load(table + line * table_stride + at // PAGE, mask=real, other=0).to(tl.int64)
    where = (block * BLOCK_STRIDE + at % PAGE * SLOT_STRIDE)[:, None]
    where += (column // DIM * HEAD_STRIDE + column % DIM)[None, :]
    width: tl.constexpr = KV_HEADS * DIM
    inside = (column < width)[None, :]
    target = ((piece.to(tl.int64) * length + at) * width)[:, None] + column[None, :]
    written = inside & (at < length)[:, None]
    mask = inside & real[:, None]
    tl.store(out + target, tl.load(k_cache + where, mask=mask, other=0.0), mask=written)
    out += count.to(tl.int64) * length * width
    tl.store(out + target, tl.load(v_cache + where, mask=mask, other=0.0), mask=written)


def gather(
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor | None,
    seq_lens: Tensor,
    first_row: int,
    count: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of batch rows first_row.. as [count, length, kv_heads, dim] each; zeros beyond a row's tokens."""
    page, kv_heads, dim = k_cache.shape[1:]
    out = torch.empty(2, count, length, kv_heads, dim, dtype=k_cache.dtype, device=k_cache.device)
    block_c = pow2(kv_heads * dim)
    block_t = max(1, 8192 // block_c)
    _gather[(cdiv(length, block_t), count)](
        k_cache,
        v_cache,
        table,
        table if rows is None else rows,
        seq_lens,
        out,
        first_row,
        table.stride(0),
        length,
        kv_heads,
        dim,
        page,
        *k_cache.stride()[:3],
        rows is not None,
        block_t,
        block_c,
        num_warps=4,
    )
    return out[0], out[1]


@kernel("skip", "padded")
def _merge(
    a: tl.tensor,
    a_log: tl.tensor,
    b: tl.tensor,
    b_log: tl.tensor,
    out: tl.tensor,
    skip: tl.tensor,
    padded: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = head < HEADS
    a_weight = tl.load(a_log + head * padded + token + skip, mask=inside, other=0.0)
    b_weight = tl.load(b_log + head * padded + token + skip, mask=inside, other=0.0)
    top = tl.maximum(a_weight, b_weight)
    a_weight = tl.exp2((a_weight - top) * LOG2E)
    b_weight = tl.exp2((b_weight - top) * LOG2E)
    total = a_weight + b_weight
    at = (head * DIM)[:, None] + tl.arange(0, DIM)[None, :]
    source = (token + skip).to(tl.int64) * HEADS * DIM
    a_part = tl.load(a + source + at, mask=inside[:, None], other=0.0).to(tl.float32)
    b_part = tl.load(b + source + at, mask=inside[:, None], other=0.0).to(tl.float32)
    merged = a_part * (a_weight / total)[:, None] + b_part * (b_weight / total)[:, None]
    tl.store(out + token.to(tl.int64) * HEADS * DIM + at, merged.to(out.dtype.element_ty), mask=inside[:, None])


def merge(a: Tensor, a_log: Tensor, b: Tensor, b_log: Tensor, out: Tensor, skip: int) -> None:
    """Attention over the union of two sets of keys: tokens skip.. of a and b [L, heads, dim] into out [T, heads, dim].

    a_log and b_log [heads, L] float32 are the natural logarithms of the sums of exponentials of each set.
    """
    tokens, heads, dim = out.shape
    assert all(x.is_contiguous() for x in (a, a_log, b, b_log, out))
    block_h = min(pow2(heads), max(1, 1024 // dim))
    _merge[(tokens, cdiv(heads, block_h))](a, a_log, b, b_log, out, skip, a.shape[0], heads, dim, block_h, num_warps=4)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, log_sum: bool = False
) -> tuple[Tensor, Tensor]:
    """q [count, L, heads, dim], k and v [count, N, kv_heads, dim] -> the same shape as q, and [count, heads, L] logs.

    The logs are natural, float32 and only there with `log_sum`. Causal: L == N, query i sees keys 0..i.
    """
    result: Any = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None,
        log_sum,
        0.0,
        causal,
        False,
        scale=scale,
    )
    return result[0].transpose(1, 2), result[1]


def dense(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor | None,
    seq_lens: Tensor,
    part: DenseRows,
    out: Tensor,
    scale: float,
    way: str | None = None,
) -> None:
    """Causal attention of `part`'s rows, into their tokens of out [T, heads, dim]; other arguments as `prefill`'s."""
    way = way or WAY
    start, skip, length = 0, 0, part.cached + part.q_len
    if way == "cudnn":
        start = part.cached // ROUND_CACHED * ROUND_CACHED
        skip = part.cached - start
        length = -(-(skip + part.q_len) // ROUND) * ROUND
    k, v = gather(k_cache, v_cache, table, rows, seq_lens, part.row, part.count, start + length)
    if way == "hopper":
        from octavo.kernels.cuda.attention_hopper import hopper

        hopper(q, k, v, out, part.token, part.q_len, part.cached, scale)
        return
    heads, dim = q.shape[1:]
    tokens = slice(part.token, part.token + part.count * part.q_len)
    fresh = q[tokens].view(part.count, part.q_len, heads, dim)
    if length != part.q_len:
        padded = torch.empty(part.count, length, heads, dim, dtype=q.dtype, device=q.device)
        padded[:, skip : skip + part.q_len] = fresh
        fresh = padded
    if not start:
        done, _ = cudnn(fresh, k, v, scale, causal=True)
        out[tokens].view(part.count, part.q_len, heads, dim).copy_(done[:, skip : skip + part.q_len])
        return
    # Slices of the only row, not of the batch: cuDNN's plans depend on every stride, that of a batch of one included.
    seen, seen_log = cudnn(fresh, k[0, :start][None], v[0, :start][None], scale, causal=False, log_sum=True)
    own, own_log = cudnn(fresh, k[0, start:][None], v[0, start:][None], scale, causal=True, log_sum=True)
    merge(seen[0], seen_log[0], own[0], own_log[0], out[tokens], skip)
