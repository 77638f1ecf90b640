"""Attention on CUDA: split-key decode for rows of one token, paged or dense prefill for the rest.

`plan` of a batch of single-token rows makes nothing new on the device, so such steps can be captured in a CUDA graph:
lengths and tables are read from device memory by the kernels, and only the batch's host bounds shape the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from octavo.attention.backend import AttnSpec, HeadNorms, Rotation
from octavo.attention.batch import Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import Kernels
from octavo.kernels.cuda import attention_decode, attention_dense, attention_prefill
from octavo.kernels.cuda.attention_dense import DenseRows
from octavo.kernels.cuda.launch import FLOATS, pdl

MAX_ARRIVALS = 1 << 16


@dataclass(frozen=True)
class Prefill:
    """Rows with several query tokens: `programs` [N, 2] walk pages with `launch`, `dense` rows go through cuDNN."""

    launch: attention_prefill.PrefillConfig
    programs: Tensor | None
    dense: tuple[DenseRows, ...]


@dataclass(frozen=True)
class Meta:
    slots: Tensor
    table: Tensor
    rows: Tensor | None
    """Table line of each batch row; None: the row itself."""
    q_start: Tensor
    seq_lens: Tensor
    num_decode: int
    max_kv: int
    """Upper bound of decode rows' lengths."""
    prefill: Prefill | None


class CudaAttention:
    """AttentionBackend for NVIDIA GPUs and head dimensions that are powers of two, with half types in mind."""

    def __init__(
        self,
        kernels: Kernels,
        specs: tuple[AttnSpec, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._kernels, self._dtype = kernels, dtype
        self._spec = specs[0]
        self._arrivals = torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)

    def supports(self, spec: AttnSpec) -> str | None:
        if self._dtype not in FLOATS:
            return f"{self._dtype}; the CUDA kernels take bfloat16, float16 and float32"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads do not divide into {spec.num_kv_heads} KV heads"
        if spec.head_dim not in (16, 32, 64, 128, 256):
            return f"heads of {spec.head_dim} dimensions; the CUDA kernels take 16, 32, 64, 128 or 256"
        if spec.block_size % 16 or spec.block_size & (spec.block_size - 1):
            return f"blocks of {spec.block_size} tokens; the CUDA kernels take powers of two from 16"
        return None

    def plan(self, batch: Batch, group: KVGroup) -> Meta:
        tables, rows = (batch.tables, None) if batch.row_tables is None else (batch.row_tables, batch.rows)
        mixed = batch.num_decode < len(batch.q_lens)
        max_kv = batch.max_kv
        if mixed and batch.num_decode:
            max_kv = int(batch.kv_lens[: batch.num_decode].max())
        return Meta(
            batch.slots[group.index],
            tables[group.index],
            rows,
            batch.q_start,
            batch.seq_lens,
            batch.num_decode,
            max_kv,
            self._plan_prefill(batch, group) if mixed else None,
        )

    def _plan_prefill(self, batch: Batch, group: KVGroup) -> Prefill:
        """Splits the rows with several tokens between the two ways, by `attention_dense.wanted`."""
        spec, first = self._spec, batch.num_decode
        q_lens, kv_lens = batch.q_lens[first:], batch.kv_lens[first:]
        starts = np.cumsum(batch.q_lens)[first:] - q_lens
        dense = [
            attention_dense.wanted(int(q), int(kv), group.window, self._dtype, spec.head_dim)
            for q, kv in zip(q_lens, kv_lens, strict=True)
        ]
        paged = np.flatnonzero(~np.array(dense))
        sharing = spec.num_heads // spec.num_kv_heads
        launch = attention_prefill.config(int(q_lens[paged].max(initial=1)), sharing, spec.head_dim)
        programs = None
        if len(paged):
            listed = attention_prefill.tiles(paged + first, q_lens[paged], kv_lens[paged], launch.block_m // sharing)
            programs = attention_prefill.upload(listed, batch.seq_lens.device)
        parts: list[DenseRows] = []
        rows = [i for i, chosen in enumerate(dense) if chosen]
        for (q_len, cached, _), same in groupby(
            enumerate(rows), key=lambda at: _alike(int(q_lens[at[1]]), int(kv_lens[at[1]]), at[1] - at[0], at[1])
        ):
            members = [row for _, row in same]
            parts.append(DenseRows(first + members[0], len(members), int(starts[members[0]]), q_len, cached))
        return Prefill(launch, programs, tuple(parts))

    def write(
        self, qkv: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        return self._kernels.rope_norm_write_kv(qkv, spec.num_heads, rotation, norms, cache.k, cache.v, meta.slots)

    def run(self, q: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if meta.num_decode:
            self._decode(q, cache, meta, spec, out)
        if meta.prefill is not None:
            self._prefill(q, cache, meta, meta.prefill, spec, out)
        return out.flatten(1)

    def _decode(self, q: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec, out: Tensor) -> None:
        count, kv_heads = meta.num_decode, spec.num_kv_heads
        max_kv = meta.max_kv if spec.window is None else min(meta.max_kv, spec.window + spec.block_size)
        launch = attention_decode.config(count, kv_heads, spec.num_heads // kv_heads, spec.head_dim, max_kv)
        if meta.prefill is not None:
            q, out = q[:count], out[:count]
        attention_decode.decode(
            q,
            cache.k,
            cache.v,
            meta.table,
            meta.rows,
            meta.seq_lens,
            out,
            launch,
            scale=spec.scale,
            window=spec.window,
            arrivals=self._arrivals,
            pdl=pdl(),
        )

    def _prefill(self, q: Tensor, cache: KVCache, meta: Meta, prefill: Prefill, spec: AttnSpec, out: Tensor) -> None:
        if prefill.programs is not None:
            attention_prefill.prefill(
                q,
                cache.k,
                cache.v,
                meta.table,
                meta.rows,
                meta.q_start,
                meta.seq_lens,
                prefill.programs,
                out,
                prefill.launch,
                scale=spec.scale,
                window=spec.window,
                pdl=pdl(),
            )
        for part in prefill.dense:
            attention_dense.dense(q, cache.k, cache.v, meta.table, meta.rows, meta.seq_lens, part, out, spec.scale)


def _alike(q_len: int, kv_len: int, run: int, row: int) -> tuple[int, int, int]:
    """Equal for neighbouring rows that one dense call takes: the same length and nothing cached."""
    cached = kv_len - q_len
    return q_len, cached, -row - 1 if cached else run
