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
from octavo.layers import MLP, AddNorm, Attention, Build, Embedding, Linear, Rope
from octavo.models.weight_map import Names, WeightMap
from octavo.parallel import Replicated
from octavo.quant import Blocks


class Block:
    """One decoder layer over the residual stream; x is what the previous block adds to it."""

    def __init__(self, facts: ModelFacts, layer: int, build: Build) -> None:
        self.attn_norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
        self.attn = Attention(facts, layer, build)
        self.mlp_norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
        self.mlp = MLP(facts, build)

    def __call__(self, x: Tensor, stream: Tensor | None, batch: Batch, rotation: Rotation) -> tuple[Tensor, Tensor]:
        x, stream = self.attn(self.attn_norm, x, stream, batch, rotation)
        return self.mlp(self.mlp_norm, x, stream)


class Llama:
    """The model: tokens of a batch -> hidden states; hidden states -> logits."""

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
        self.embed = Embedding(facts.vocab_size, facts.hidden_size, build)
        self.rope = Rope(facts.rope, build)
        self.blocks = [Block(facts, layer, build) for layer in range(facts.num_layers)]
        self.norm = AddNorm(facts.hidden_size, facts.norm_eps, build)
        self.head: Linear | None = None
        if not facts.tie_embeddings:
            self.head = Linear(facts.hidden_size, Replicated({"head": facts.vocab_size}), build)
        self._weights = self._bind()

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] after the last norm; writes the KV of the batch's tokens."""
        rotation = self.rope(batch.positions)
        x, stream = self.embed(batch.tokens), None
        for block in self.blocks:
            x, stream = block(x, stream, batch, rotation)
        assert stream is not None
        return self.norm.add(x, stream)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in the model's dtype."""
        return self.embed.project(hidden) if self.head is None else self.head(hidden)

    def load_weight(self, name: str, tensor: Tensor | Blocks) -> None:
        """Copies a checkpoint's tensor, of any float dtype or in a format that the scheme keeps, to its place.

        UnsupportedModel if it has none.
        """
        if name.endswith(".rotary_emb.inv_freq") or (self.head is None and name == "lm_head.weight"):
            return  # computed from the config; the tied head is the embedding
        self._weights.load(name, tensor)

    def finish_loading(self) -> None:
        """UnsupportedModel if a weight has not come; otherwise readies the weights for their kernels."""
        self._weights.finish()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a name of its own ("blocks.0.attn.qkv.weight")."""
        return self._weights.tensors()

    def _bind(self) -> WeightMap:
        weights = WeightMap()
        weights.bind("", self, self.names)
        for i, block in enumerate(self.blocks):
            weights.bind(f"model.layers.{i}.", block, self.block_names, f"blocks.{i}.")
        if self.head is not None:
            weights.bind("", self, self.head_names)
        return weights

    def _check(self, facts: ModelFacts) -> None:
        for switch in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            if getattr(facts, switch) and switch not in self.optional:
                raise UnsupportedModel(f"{facts.architecture} models have no {switch}, but the configuration sets it")
        if any(facts.windows) and not self.windowed:
            raise UnsupportedModel(
                f"{facts.architecture} models have no sliding window, but the configuration sets one"
            )
