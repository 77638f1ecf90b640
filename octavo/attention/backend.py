"""What an attention backend is, and the facts about a layer that it works from.

A step calls `plan` once per KV group; each layer then calls `attend`. Normalising, rotating and writing belong to it,
so that a backend can do them in the kernel that attends; a token's KV is written before any token sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from octavo.attention.batch import Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.core.facts import ModelFacts

Rotation = tuple[Tensor, Tensor]
"""(cos, sin) of a step's tokens, as `Kernels.rotation` returns them."""
HeadNorms = tuple[Tensor, Tensor, float]
"""RMSNorm of each query and key head: (query weight [dim], key weight [dim], epsilon)."""


@dataclass(frozen=True)
class AttnSpec:
    """Attention of one layer as data: softmax(q k^T * scale) v over the last `window` tokens (None: all)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    block_size: int


class AttentionBackend(Protocol):
    """Paged attention. `Meta` is the backend's own; the worker only carries it from `plan` to layers in batch.meta."""

    @property
    def replays(self) -> bool:
        """Whether a decode step can be recorded: all that varies is read on the device."""

    def supports(self, spec: AttnSpec) -> str | None:
        """None for yes, otherwise the reason why not."""

    def plan(self, batch: Batch, group: KVGroup) -> Any:
        """What the layers of `group` share in this step: the Meta for batch.meta[group.index]."""

    def attend(
        self, qkv: Tensor, cache: KVCache, meta: Any, spec: AttnSpec, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        """Normalises and rotates q and k, writes k and v; then each token attends to its row's tokens up to itself.

        qkv [T, (heads + 2 * kv_heads) * dim], q, k and v side by side -> [T, heads * dim].
        """


def attn_specs(facts: ModelFacts, block_size: int) -> tuple[AttnSpec, ...]:
    """The spec of each layer."""
    return tuple(
        AttnSpec(facts.num_heads, facts.num_kv_heads, facts.head_dim, facts.head_dim**-0.5, window, block_size)
        for window in facts.windows
    )
