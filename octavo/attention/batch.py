"""The batch of one step: the only thing that layers and attention backends see of the engine.

Every layer is called with `(x, batch)`. Owns no memory: tensors are views of the worker's row state and step buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer: [num_blocks, block_size, kv_heads, head_dim] each. Block 0 is padding."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Batch:
    """T tokens of B rows, packed in row order; S of them are projected to logits; G KV groups.

    Rows with a single query token stand first (`num_decode` of them); a row's tokens are consecutive positions.
    """

    tokens: Tensor
    """[T] int64 token ids."""
    positions: Tensor
    """[T] int64 position of each token in its sequence."""
    row_of: Tensor
    """[T] int64 index into the batch (0..B-1) of each token's row."""
    q_start: Tensor
    """[B+1] int32 where each row's tokens begin."""
    seq_lens: Tensor
    """[B] int32 tokens of each row whose KV exists after this step's writes."""
    slots: tuple[Tensor, ...]
    """Per group [T] int64: where each token's KV goes, block * block_size + offset."""
    tables: tuple[Tensor, ...]
    """Per group [B, max_blocks] int32 block ids; freed and unused entries are 0, the padding block. Or () with rows."""
    logits_at: Tensor
    """[S] int64 indices into T of the hidden states to project."""
    num_decode: int
    max_q: int
    max_kv: int
    """Upper bounds, known on the host, for launch shapes."""
    q_lens: Ints
    kv_lens: Ints
    """[B] on the host; kv_lens are upper bounds of seq_lens."""
    kv: tuple[KVCache, ...]
    """Per layer."""
    meta: tuple[Any, ...] = ()
    """Per group: what the attention backend's `plan` returned."""
    rows: Tensor | None = None
    """[B] int64 row of each batch row in `row_tables`; None: see `tables`."""
    row_tables: tuple[Tensor, ...] | None = None
    """Per group the row state's block tables [R+1, max_blocks] int32."""
    order: Tensor | None = None
    """[num_decode] int32 the decode rows, longest first: what runs in turns should begin with the longest."""
    ends: Batch | None = None
    """The tokens at `logits_at` as rows of one token each. The last layer goes on with these alone, once it has written
    the KV of all; None: with all tokens."""

    def table(self, group: int) -> Tensor:
        """[B, max_blocks] int32, gathered where it is not there."""
        if self.rows is None or self.row_tables is None:
            return self.tables[group]
        return self.row_tables[group][self.rows]

    def with_meta(self, meta: tuple[Any, ...]) -> Batch:
        return replace(self, meta=meta)
