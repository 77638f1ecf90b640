"""Attention on CPUs: one C call a layer for the whole batch, straight over the paged cache.

`plan` fills the record that the call reads; layers only add addresses. Lengths and tables stay in memory, where the
kernel finds them when it runs. Caches of other types than float32 and bfloat16 and heads of more than 256 dimensions go
to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.attention import reference
from octavo.attention.backend import AttnSpec, HeadNorms, Rotation
from octavo.attention.batch import Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import Kernels
from octavo.kernels.cpu.native import HALF, Attention, Step, dense, functions, run

MAX_DIM = 256


@dataclass(frozen=True)
class Meta:
    slots: Tensor
    step: Step
    pairs: int
    """Of queries and keys, at most."""
    held: tuple[Tensor, ...]
    """The memory that `step` points into."""


class CpuAttention:
    """AttentionBackend over octavo.kernels.cpu; every layer has the heads of the first spec."""

    def __init__(self, kernels: Kernels, specs: tuple[AttnSpec, ...]) -> None:
        self._kernels, self._spec = kernels, specs[0]
        self._reference = reference.ReferenceAttention(kernels)
        self.replays = self._spec.head_dim <= MAX_DIM

    def supports(self, spec: AttnSpec) -> str | None:
        return self._reference.supports(spec)

    def plan(self, batch: Batch, group: KVGroup) -> Meta | reference.Meta:
        spec, cache = self._spec, batch.kv[group.layers[0]]
        if spec.head_dim > MAX_DIM or not (dense(cache.k) and dense(cache.v)) or cache.k.dtype != cache.v.dtype:
            return self._reference.plan(batch, group)
        table, lines = batch.tables, None
        if batch.row_tables is not None and batch.rows is not None:
            table, lines = batch.row_tables, batch.rows.contiguous()
        blocks = table[group.index]
        if blocks.stride(1) != 1:
            blocks = blocks.contiguous()
        q_start, seq_lens = batch.q_start.contiguous(), batch.seq_lens.contiguous()
        step = Step(
            tables=blocks.data_ptr(),
            lines=None if lines is None else lines.data_ptr(),
            q_start=q_start.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            rows=len(batch.q_lens),
            table_stride=blocks.stride(0),
            block_size=spec.block_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.head_dim,
            window=group.window or 0,
            half_kv=HALF[cache.k.dtype],
        )
        held = (blocks, q_start, seq_lens) if lines is None else (blocks, q_start, seq_lens, lines)
        return Meta(batch.slots[group.index], step, int(batch.q_lens @ batch.kv_lens), held)

    def attend(
        self,
        qkv: Tensor,
        cache: KVCache,
        meta: Meta | reference.Meta,
        spec: AttnSpec,
        rotation: Rotation,
        norms: HeadNorms | None,
    ) -> Tensor:
        if isinstance(meta, reference.Meta):
            return self._reference.attend(qkv, cache, meta, spec, rotation, norms)
        q = self._kernels.rope_norm_write_kv(qkv, spec.num_heads, rotation, norms, cache.k, cache.v, meta.slots)
        return self._run(q, cache, meta, spec)

    def _run(self, q: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec) -> Tensor:
        if q.dtype not in HALF:
            return self._run(q.float(), cache, meta, spec).to(q.dtype)
        if q.stride(2) != 1 or q.stride(1) != spec.head_dim:
            q = q.contiguous()
        out = q.new_empty((q.shape[0], spec.num_heads * spec.head_dim))
        call = Attention(
            meta.step,
            q.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            out.data_ptr(),
            q.stride(0),
            spec.scale,
            HALF[q.dtype],
        )
        run(functions().attention, call, meta.pairs * spec.num_heads * spec.head_dim)
        return out
