"""qkv products for attention tests, made of given queries and of tokens that a paged cache holds already."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention import KVCache, Rotation
from tests.support.paged import Paged


def unwritten(q: Tensor, cache: KVCache, slots: Tensor) -> tuple[Tensor, Rotation]:
    """The product [T, (heads + 2 * kv_heads) * dim] of q [T, heads, dim] and the cache's tokens at `slots`, unrotated.

    With it a rotation that turns nothing. The cache forgets these tokens: they are NaN until they are written again.
    """
    at = (slots // cache.k.shape[1], slots % cache.k.shape[1])
    qkv = torch.cat((q, cache.k[at], cache.v[at]), 1).flatten(1)
    cache.k[at] = cache.v[at] = float("nan")
    cos = torch.ones(len(q), 1, q.shape[-1], device=q.device)
    return qkv, (cos, torch.zeros_like(cos))


def newest(cache: Paged, queries: list[int] | None = None) -> Tensor:
    """[T] int64 the slots of each row's last queries[i] tokens (one); slot 0 for rows without."""
    page, slots = cache.k.shape[1], []
    for i, length in enumerate(cache.seq_lens.tolist()):
        line = cache.table[cache.rows[i]].tolist()
        count = 1 if queries is None else queries[i]
        slots += [line[p // page] * page + p % page if p >= 0 else 0 for p in range(length - count, length)]
    return torch.tensor(slots, device=cache.k.device)
