"""Attention on CUDA: split-key decode for rows of one token, one prefill launch for the rest.

Rows of a single token take one launch a layer: their decode normalises, rotates and writes as well. For the other rows
a launch before their attention does. Those may read what the first wrote, but not the other way round.

Prefill is Hopper's own kernel wherever it fits, because it was the faster one at every size measured (16 rows of 550
tokens: 77 against 114 us, 16,384 tokens: 617 against 418 TFLOP/s), and the portable one otherwise: other devices, head
dimensions other than 64 and 128, float32, and windows that hide keys.

`plan` of a batch of single-token rows makes nothing new on the device, so such steps can be captured in a CUDA graph:
lengths and tables are read from device memory by the kernels, and only the batch's host bounds shape the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.attention.backend import AttnSpec, HeadNorms, Rotation
from octavo.attention.batch import Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import Kernels
from octavo.kernels.cuda import attention_decode, attention_prefill, rope
from octavo.kernels.cuda.attention_decode import NewTokens
from octavo.kernels.cuda.launch import FLOATS, is_hopper, pdl

if TYPE_CHECKING:
    from octavo.kernels.cuda.attention_hopper import Hopper

MAX_ARRIVALS = attention_decode.SPLIT_BELOW


@dataclass(frozen=True)
class Prefill:
    """Rows with several query tokens: `programs` [N, 2] (row, first token); no launch: Hopper's kernel.

    `q_start` counts tokens from the first of these rows.
    """

    launch: attention_prefill.PrefillConfig | None
    programs: Tensor
    q_start: Tensor


@dataclass(frozen=True)
class Meta:
    slots: Tensor
    table: Tensor
    rows: Tensor | None
    """Table line of each batch row; None: the row itself."""
    order: Tensor | None
    """Decode rows, longest first, where known."""
    seq_lens: Tensor
    num_decode: int
    max_kv: int
    """Upper bound of decode rows' lengths."""
    prefill: Prefill | None


class CudaAttention:
    """AttentionBackend for NVIDIA GPUs and head dimensions that are powers of two, with half types in mind."""

    replays: ClassVar[bool] = True

    def __init__(
        self,
        kernels: Kernels,
        specs: tuple[AttnSpec, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._kernels, self._dtype = kernels, dtype
        self._spec = specs[0]
        self._hopper = _load_hopper(self._spec, device, dtype)
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
            batch.order,
            batch.seq_lens,
            batch.num_decode,
            max_kv,
            self._plan_prefill(batch, group) if mixed else None,
        )

    def _plan_prefill(self, batch: Batch, group: KVGroup) -> Prefill:
        spec, first = self._spec, batch.num_decode
        q_lens, kv_lens = batch.q_lens[first:], batch.kv_lens[first:]
        sharing = spec.num_heads // spec.num_kv_heads
        launch = None
        if self._hopper is not None and (group.window is None or group.window >= kv_lens.max()):
            tokens = self._hopper.tokens
        else:
            launch = attention_prefill.config(int(q_lens.max()), sharing, spec.head_dim)
            tokens = launch.block_m // sharing
        listed = attention_prefill.tiles(np.arange(first, len(batch.q_lens)), q_lens, kv_lens, tokens)
        q_start = batch.q_start - first if first else batch.q_start
        return Prefill(launch, attention_prefill.upload(listed, batch.seq_lens.device), q_start)

    def attend(
        self, qkv: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        out = torch.empty((qkv.shape[0], spec.num_heads, spec.head_dim), dtype=qkv.dtype, device=qkv.device)
        first, (cos, sin) = meta.num_decode, rotation

        def write(tokens: slice) -> Tensor:
            """Queries of these tokens, whose keys and values go to the cache."""
            turn, slots = (cos[tokens], sin[tokens]), meta.slots[tokens]
            return self._kernels.rope_norm_write_kv(qkv[tokens], spec.num_heads, turn, norms, cache.k, cache.v, slots)

        if first:
            if rope.readable(qkv, cos, cache.k, cache.v):
                new = NewTokens(meta.slots[:first], (cos[:first], sin[:first]), norms)
                self._decode(qkv[:first], cache, meta, spec, out[:first], new)
            else:
                self._decode(write(slice(first)), cache, meta, spec, out[:first], None)
        if meta.prefill is not None:
            self._prefill(write(slice(first, None)), cache, meta, meta.prefill, spec, out[first:])
        return out.flatten(1)

    def _decode(
        self, q: Tensor, cache: KVCache, meta: Meta, spec: AttnSpec, out: Tensor, new: NewTokens | None
    ) -> None:
        count, kv_heads = meta.num_decode, spec.num_kv_heads
        max_kv = meta.max_kv if spec.window is None else min(meta.max_kv, spec.window + spec.block_size)
        launch = attention_decode.config(count, kv_heads, spec.num_heads // kv_heads, spec.head_dim, max_kv)
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
            order=meta.order,
            arrivals=self._arrivals,
            new=new,
            pdl=False,  # measured: a product that starts early slows attention by more than the launch it saves
        )

    def _prefill(self, q: Tensor, cache: KVCache, meta: Meta, prefill: Prefill, spec: AttnSpec, out: Tensor) -> None:
        rows = (meta.table, meta.rows, prefill.q_start, meta.seq_lens, prefill.programs)
        if prefill.launch is not None:
            attention_prefill.prefill(
                q, cache.k, cache.v, *rows, out, prefill.launch, scale=spec.scale, window=spec.window, pdl=pdl()
            )
        else:
            assert self._hopper is not None
            self._hopper.prefill(q, cache.k, cache.v, *rows, out, scale=spec.scale, pdl=pdl())


def _load_hopper(spec: AttnSpec, device: torch.device, dtype: torch.dtype) -> Hopper | None:
    """The kernel for compute capability 9.0, where device and shapes fit it."""
    if not is_hopper(device):
        return None
    from octavo.kernels.cuda import attention_hopper

    if not attention_hopper.fits(dtype, spec.num_heads // spec.num_kv_heads, spec.head_dim, spec.block_size):
        return None
    return attention_hopper.Hopper(spec.num_heads, spec.num_kv_heads, device)
