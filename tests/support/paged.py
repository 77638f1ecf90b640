"""Ragged rows in a paged cache whose unowned memory is NaN, and their attention in float64, for kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paged:
    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor
    seq_lens: Tensor
    window: int | None


def paged(
    lens: list[int],
    kv_heads: int,
    dim: int,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    page: int = 16,
    seed: int = 0,
    window: int | None = None,
    queries: list[int] | None = None,
    heads_first: bool = False,
) -> Paged:
    """Rows of these lengths in shuffled blocks and shuffled table lines; freed, spare and padding memory is NaN.

    With a window, blocks that no query of a row sees are freed: their entries are 0, as the worker leaves them.
    `heads_first` lays a block's memory out as [kv_heads, page, dim].
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-n // page) for n in lens]
    total = 1 + sum(blocks)
    memory = torch.randn(2, total, page, kv_heads, dim, generator=generator).to(dtype)
    memory[:, 0] = float("nan")
    order = (torch.randperm(total - 1, generator=generator) + 1).to(torch.int32)
    rows = torch.randperm(len(lens) + 3, generator=generator)[: len(lens)]
    table = torch.zeros(len(lens) + 3, max(blocks, default=0) + 2, dtype=torch.int32)
    taken = 0
    for i, (length, count) in enumerate(zip(lens, blocks, strict=True)):
        own = order[taken : taken + count].clone()
        taken += count
        if length % page:
            memory[:, own[-1], length % page :] = float("nan")
        if window is not None:
            gone = max(0, length - (queries[i] if queries else 1) - window + 1) // page
            memory[:, own[:gone].long()] = float("nan")
            own[:gone] = 0
        table[rows[i], :count] = own
    memory = memory.to(device)
    if heads_first:
        memory = memory.transpose(2, 3).contiguous().transpose(2, 3)
    return Paged(
        memory[0],
        memory[1],
        table.to(device),
        rows.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        window,
    )


def expected(q: Tensor, cache: Paged, queries: list[int], scale: float) -> Tensor:
    """Causal attention in float64 of q [T, heads, dim]; row i's last queries[i] tokens ask. Zeros for empty rows."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    page, sharing = cache.k.shape[1], q.shape[1] // cache.k.shape[2]
    begin = 0
    for i, count in enumerate(queries):
        length = int(cache.seq_lens[i])
        at = torch.arange(length, device=q.device)
        block = cache.table[cache.rows[i]][at // page].long()
        k, v = (x[block, at % page].double().repeat_interleave(sharing, 1) for x in (cache.k, cache.v))
        position = torch.arange(length - count, length, device=q.device)[:, None]
        hidden = at > position
        if cache.window is not None:
            hidden |= at <= position - cache.window
        if length:
            first = int((~hidden).any(0).nonzero()[0])
            scores = torch.einsum("qhd,nhd->hqn", q[begin : begin + count].double(), k[first:]) * scale
            weights = scores.masked_fill(hidden[:, first:], float("-inf")).softmax(-1)
            out[begin : begin + count] = torch.einsum("hqn,nhd->qhd", weights, v[first:])
        begin += count
    return out
