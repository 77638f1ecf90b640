"""Attention in plain torch: gathers the blocks that a row can see, then scaled_dot_product_attention.

Rows with one query token run together, padded to the longest of their length class (powers of two), so that one long
row does not inflate the others; rows with more tokens run one by one. Memory beyond a row's newest token is never
loaded: the gather reads that token in its place and the mask hides it, so stale NaN or infinity stays where it is.
K and V are not repeated for the heads that share them: those heads are the query dimension, or a zero stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.attention.backend import AttnSpec, HeadNorms, Rotation
from octavo.attention.batch import Batch, Ints, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import Kernels


@dataclass(frozen=True)
class Part:
    """Some rows with equal numbers of query tokens."""

    tokens: slice | Tensor
    """Their tokens in the batch; a slice, or for single-token rows [rows] int64."""
    slots: Tensor
    """[rows * L] int64: where the keys and values lie that they may see."""
    mask: Tensor | None
    """Added to the scores: [rows, 1, 1, L], or [T, L] for one row; None: causal, the row has no earlier tokens."""
    rows: int


@dataclass(frozen=True)
class Meta:
    slots: Tensor
    decode: tuple[Part, ...]
    prefill: tuple[Part, ...]


class ReferenceAttention:
    """AttentionBackend for every device and float type."""

    replays: ClassVar[bool] = False

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def supports(self, spec: AttnSpec) -> str | None:
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads do not divide into {spec.num_kv_heads} KV heads"
        return None

    def plan(self, batch: Batch, group: KVGroup) -> Meta:
        decode = [_plan_part(batch, group, rows) for rows in _length_classes(batch, group.window)]
        starts = np.cumsum(batch.q_lens) - batch.q_lens
        prefill = [
            _plan_part(batch, group, slice(row, row + 1), int(starts[row]))
            for row in range(batch.num_decode, len(batch.q_lens))
        ]
        return Meta(batch.slots[group.index], tuple(decode), tuple(prefill))

    def attend(
        self, qkv: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        q = self._kernels.rope_norm_write_kv(qkv, spec.num_heads, rotation, norms, cache.k, cache.v, meta.slots)
        q = q.view(q.shape[0], spec.num_kv_heads, -1, spec.head_dim)  # [T, kv_heads, heads of each, dim]
        keys, values = cache.k.flatten(0, 1), cache.v.flatten(0, 1)
        if len(meta.decode) == 1 and not meta.prefill:
            return _decode(q, keys, values, meta.decode[0], spec.scale).flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in meta.decode:
            out[part.tokens] = _decode(q[part.tokens], keys, values, part, spec.scale)
        for part in meta.prefill:
            out[part.tokens] = _prefill(q[part.tokens], keys, values, part, spec.scale)
        return out.flatten(1)


def _length_classes(batch: Batch, window: int | None) -> list[slice | Ints]:
    """The decode rows, by the power of two above the KV that they see."""
    lens = batch.kv_lens[: batch.num_decode]
    classes = np.frexp(lens if window is None else np.minimum(lens, window))[1]
    distinct = np.unique(classes)
    if len(distinct) == 1:
        return [slice(0, batch.num_decode)]
    return [np.flatnonzero(classes == c).astype(np.int32) for c in distinct]


def _plan_part(batch: Batch, group: KVGroup, rows: slice | Ints, first_token: int | None = None) -> Part:
    """Decode rows (their token's index is the row's), or one row whose tokens begin at `first_token`."""
    window, device, cache = group.window, batch.tokens.device, batch.kv[group.layers[0]].k
    q_len = 1 if first_token is None else int(batch.q_lens[rows][0])
    kv_len = int(batch.kv_lens[rows].max())
    tokens: slice | Tensor
    if first_token is not None:
        tokens = slice(first_token, first_token + q_len)
    else:
        tokens = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(device, torch.int64)
    pick = rows if isinstance(rows, slice) else tokens
    length = kv_len if window is None else min(kv_len, window - 1 + q_len)
    newest = batch.seq_lens[pick].to(torch.int64).unsqueeze(1) - 1  # [rows, 1]
    positions = torch.arange(length, device=device)
    if window is not None:
        positions = positions + (newest - (q_len - 1 + window - 1)).clamp_min(0)
    positions = positions.expand(len(newest), -1)  # [rows, L]; beyond the newest token they are hidden by the mask
    loaded = torch.minimum(positions, newest).clamp_min(0)
    block_size = cache.shape[1]
    blocks = batch.table(group.index)[pick].gather(1, loaded // block_size)
    slots = (blocks.to(torch.int64) * block_size + loaded % block_size).flatten()
    if first_token is not None and kv_len == q_len and (window is None or window >= q_len):
        return Part(tokens, slots, None, len(newest))
    hidden = _hidden(positions, batch.positions[tokens], window)
    mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=device).masked_fill_(hidden, float("-inf"))
    return Part(tokens, slots, mask if first_token is not None else mask[:, None, None], len(newest))


def _hidden(positions: Tensor, q_positions: Tensor, window: int | None) -> Tensor:
    """Which key positions [rows, L] (or [1, L] for one row) a query at each q_positions [Q] may not see: [Q, L]."""
    queries = q_positions.unsqueeze(1)
    hidden = positions > queries
    return hidden if window is None else hidden | (positions <= queries - window)


def _decode(q: Tensor, keys: Tensor, values: Tensor, part: Part, scale: float) -> Tensor:
    """q [rows, kv_heads, g, dim] -> the same shape."""
    k = (
        keys.index_select(0, part.slots).view(part.rows, -1, *keys.shape[1:]).transpose(1, 2)
    )  # [rows, kv_heads, L, dim]
    v = values.index_select(0, part.slots).view(part.rows, -1, *keys.shape[1:]).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, scale=scale)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, part: Part, scale: float) -> Tensor:
    """q [T, kv_heads, g, dim] of one row -> the same shape."""
    q = q.permute(1, 2, 0, 3)  # [kv_heads, g, T, dim]
    shared = (-1, q.shape[1], -1, -1)
    k = keys.index_select(0, part.slots).transpose(0, 1).unsqueeze(1).expand(shared)
    v = values.index_select(0, part.slots).transpose(0, 1).unsqueeze(1).expand(shared)
    causal = part.mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3)
