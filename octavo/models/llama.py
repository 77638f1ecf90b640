"""Llama (arXiv:2302.13971, 2407.21783): pre-norm decoder with rotary positions, grouped-query attention and SwiGLU.

The other families of this package are relatives that differ in what they accept and in a few weight names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from octavo.attention import Batch, Rotation
from octavo.core.errors import UnsupportedModel
from octavo.core.facts import ModelFacts
from octavo.layers import MLP, AddNorm, Attention, Build, Embedding, Head, Join, Rope
from octavo.models.weight_map import Names, WeightMap
from octavo.quant import Stored


class Block:
    """One decoder layer over the residual stream; x is what the previous block adds to it, or the stream itself."""

    def __init__(self, facts: ModelFacts, layer: int, build: Build) -> None:
        self.attn_norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
        self.attn = Attention(facts, layer, build)
        self.mlp_norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
        self.mlp = MLP(facts, build)

    def __call__(
        self, x: Tensor, stream: Tensor | None, batch: Batch, rotation: Rotation, ends: Batch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """With `ends`, the result is that of these tokens of the batch alone."""
        x, stream = self.attn(self.attn_norm, x, stream, batch, rotation, ends)
        return self.mlp(self.mlp_norm, x, stream)


class Llama:
    """The model: tokens of a batch -> hidden states; hidden states -> logits.

    A stage of a pipeline is the same with some of the layers: the first one embeds, the last one has norm and head.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"qkv_bias", "output_bias", "mlp_bias"})
    """Switches of ModelFacts that the family may set."""
    windowed: ClassVar[bool] = False
    """Whether layers may attend to a window only."""
    block_names: ClassVar[Names] = {
        "input_layernorm": ("attn_norm", ""),
        "self_attn.q_proj": ("attn.qkv", "q"),
        "self_attn.k_proj": ("attn.qkv", "k"),
        "self_attn.v_proj": ("attn.qkv", "v"),
        "self_attn.o_proj": ("attn.out", "out"),
        "post_attention_layernorm": ("mlp_norm", ""),
        "mlp.gate_proj": ("mlp.gate_up", "gate"),
        "mlp.up_proj": ("mlp.gate_up", "up"),
        "mlp.down_proj": ("mlp.down", "down"),
    }
    names: ClassVar[Names] = {"model.embed_tokens": ("embed", ""), "model.norm": ("norm", "")}
    head_names: ClassVar[Names] = {"lm_head": ("head", "head")}

    def __init__(self, facts: ModelFacts, build: Build) -> None:
        self._check(facts)
        layers = build.layers or range(facts.num_layers)
        first, last = layers.start == 0, layers.stop == facts.num_layers
        self._tied, self._num_layers = facts.tie_embeddings, facts.num_layers
        self.embed: Embedding | None = None
        self.norm: AddNorm | None = None
        self.head: Head | None = None
        if first or (last and self._tied):
            self.embed = Embedding(facts.vocab_size, facts.hidden_size, build)
        self.rope = Rope(facts.rope, build)
        self.blocks = {layer: Block(facts, layer, build) for layer in layers}
        self.join = Join(build)
        if last:
            self.norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
            self.head = self.embed if self._tied else Head(facts.vocab_size, facts.hidden_size, build)
        self._weights = self._bind()

    def __call__(self, batch: Batch, stream: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden] after the last norm, or of its `ends` alone; writes the KV of all tokens.

        A stage takes up the `stream` of the stage before and, unless it is the last, returns its own.
        """
        rotation = self.rope(batch.positions)
        if stream is None:
            assert self.embed is not None
            stream = self.embed(batch.tokens)
        x: Tensor = stream
        residual: Tensor | None = None
        *blocks, last = self.blocks.values()
        for block in blocks:
            x, residual = block(x, residual, batch, rotation)
        x, residual = last(x, residual, batch, rotation, None if self.norm is None else batch.ends)
        return self.join(x, residual) if self.norm is None else self.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in the model's dtype."""
        assert self.head is not None
        return self.head.project(hidden)

    def load_weight(self, name: str, tensor: Stored) -> None:
        """Copies this rank's share of a checkpoint's tensor, in any format that the scheme takes, to its place.

        Those of other stages are passed over. UnsupportedModel for a tensor that has no place anywhere.
        """
        if name.endswith(".rotary_emb.inv_freq") or (self._tied and name == "lm_head.weight"):
            return  # computed from the config; the tied head is the embedding
        self._weights.load(name, tensor)

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and whole shape of every tensor that `load_weight` needs."""
        return self._weights.slots()

    def finish_loading(self) -> None:
        """UnsupportedModel if a weight has not come; otherwise readies the weights for their kernels."""
        self._weights.finish()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a name of its own ("blocks.0.attn.qkv.weight")."""
        return self._weights.tensors()

    def _bind(self) -> WeightMap:
        weights = WeightMap()
        tables = dict(self.names) if self._tied else {**self.names, **self.head_names}
        for name, (path, part) in tables.items():
            if getattr(self, path) is None:
                weights.leave_out(f"{name}.")
            else:
                weights.bind("", self, {name: (path, part)})
        for layer in range(self._num_layers):
            prefix = f"model.layers.{layer}."
            if layer in self.blocks:
                weights.bind(prefix, self.blocks[layer], self.block_names, f"blocks.{layer}.")
            else:
                weights.leave_out(prefix)
        return weights

    def _check(self, facts: ModelFacts) -> None:
        for switch in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            if getattr(facts, switch) and switch not in self.optional:
                raise UnsupportedModel(f"{facts.architecture} models have no {switch}, but the configuration sets it")
        if any(facts.windows) and not self.windowed:
            raise UnsupportedModel(
                f"{facts.architecture} models have no sliding window, but the configuration sets one"
            )
