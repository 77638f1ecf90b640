"""The attention block: projections around a backend."""

from __future__ import annotations

from torch import Tensor

from octavo.attention import Batch, HeadNorms, Rotation
from octavo.core.facts import ModelFacts
from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.layers.norm import AddNorm, RMSNorm
from octavo.parallel import Heads, Row


class Attention:
    """Grouped-query attention (arXiv:2305.13245) of one layer, of the normalised stream: partial sums [T, hidden].

    With `facts.qk_norm` every query and key head is normalised before it is rotated.
    """

    def __init__(self, facts: ModelFacts, layer: int, build: Build) -> None:
        hidden, heads = facts.hidden_size, Heads(facts.num_heads, facts.num_kv_heads, facts.head_dim)
        self.qkv = Linear(hidden, heads, build, bias=facts.qkv_bias)
        self.out = Linear(facts.q_size, Row({"out": hidden}), build, bias=facts.output_bias)
        self._norms: HeadNorms | None = None
        if facts.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(facts.head_dim, facts.norm_eps, build) for _ in range(2))
            self._norms = (self.q_norm.weight, self.k_norm.weight, facts.norm_eps)
        self._kernels, self._backend, self._spec = build.kernels, build.attention, build.specs[layer]
        self._layer, self._group = layer, build.group_of(layer)

    def __call__(
        self,
        norm: AddNorm,
        partial: Tensor,
        stream: Tensor | None,
        batch: Batch,
        rotation: Rotation,
        ends: Batch | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(partial sums, stream) or (stream, None): the stream takes up `partial` and is normalised first.

        With `ends` all keys and values are written, and the result is that of these tokens alone.
        """
        cache, spec = batch.kv[self._layer], self._spec
        qkv, stream = norm.into(self.qkv, partial, stream)
        if ends is not None:
            slots, (cos, sin), at = batch.slots[self._group], rotation, batch.logits_at
            self._kernels.rope_norm_write_kv(qkv, spec.num_heads, rotation, self._norms, cache.k, cache.v, slots)
            batch, qkv, stream, rotation = ends, qkv[at], stream[at], (cos[at], sin[at])
        meta = batch.meta[self._group]
        return self.out.onto(self._backend.attend(qkv, cache, meta, spec, rotation, self._norms), stream)
