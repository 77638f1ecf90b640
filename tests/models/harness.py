"""Runs a model over a paged cache with batches built by hand, and makes the transformers models it is compared with.

Memory that no token owns is NaN, blocks that a window has left behind included, so a read of it shows in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.attention import Batch, KVCache, attn_specs, load_backend
from octavo.config.kv import kv_groups
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.kernels import load
from octavo.models import build_model


@dataclass
class Held:
    """What a sequence has computed, and its blocks per KV group."""

    length: int = 0
    blocks: list[list[int]] = field(default_factory=list)


class Runner:
    """A model and its cache. `step` feeds tokens to named sequences and returns the logits of each fed token."""

    def __init__(
        self, facts: ModelFacts, dtype: torch.dtype = torch.float32, block_size: int = 4, num_blocks: int = 200
    ) -> None:
        self.facts, self.block_size = facts, block_size
        self.groups = kv_groups(facts)
        kernels = load("cpu")
        self.backend = load_backend(kernels, attn_specs(facts, block_size))
        self.model = build_model(
            facts,
            dtype=dtype,
            device=torch.device("cpu"),
            kernels=kernels,
            attention=self.backend,
            groups=self.groups,
            block_size=block_size,
        )
        shape = (num_blocks, block_size, facts.num_kv_heads, facts.head_dim)
        nan = float("nan")
        pool = [
            KVCache(torch.full(shape, nan, dtype=dtype), torch.full(shape, nan, dtype=dtype))
            for _ in self.groups[0].layers
        ]
        place = {layer: j for group in self.groups for j, layer in enumerate(group.layers)}
        self.pool = pool
        self.kv = tuple(pool[place[layer]] for layer in range(facts.num_layers))
        self.free = list(range(num_blocks - 1, 0, -1))
        self.sequences: dict[str, Held] = {}

    def load(self, weights: Mapping[str, Tensor]) -> Runner:
        for name, tensor in weights.items():
            self.model.load_weight(name, tensor)
        self.model.finish_loading()
        return self

    def share(self, old: str, new: str, tokens: int) -> None:
        """Begins `new` with the blocks of `old`'s first tokens, as a prefix hit does."""
        assert tokens % self.block_size == 0
        self.sequences[new] = Held(tokens, [b[: tokens // self.block_size] for b in self.sequences[old].blocks])

    def step(self, feed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One batch; rows with a single token first, as the scheduler orders them."""
        order = sorted(feed, key=lambda name: len(feed[name]) > 1)
        sequences = [self.sequences.setdefault(n, Held(0, [[] for _ in self.groups])) for n in order]
        counts = [len(feed[name]) for name in order]
        for sequence, count in zip(sequences, counts, strict=True):
            self._grow(sequence, sequence.length + count)
        batch = self._batch([list(feed[name]) for name in order], sequences)
        meta = tuple(self.backend.plan(batch, group) for group in self.groups)
        hidden = self.model(replace(batch, meta=meta))
        logits = self.model.logits(hidden[batch.logits_at])
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.length += count
        return dict(zip(order, torch.split(logits, counts), strict=True))

    def _grow(self, sequence: Held, tokens: int) -> None:
        """Gives up what lies behind each group's window, then owns blocks for `tokens` tokens."""
        for group, blocks in zip(self.groups, sequence.blocks, strict=True):
            if group.window is not None:
                for i in range(max(sequence.length - group.window + 1, 0) // self.block_size):
                    block, blocks[i] = blocks[i], 0
                    if block and not any(block in s.blocks[group.index] for s in self.sequences.values()):
                        for cache in self.pool:
                            cache.k[block], cache.v[block] = float("nan"), float("nan")
            while len(blocks) * self.block_size < tokens:
                blocks.append(self.free.pop())

    def _batch(self, tokens: list[list[int]], sequences: list[Held]) -> Batch:
        counts = np.array([len(t) for t in tokens], np.int32)
        before = np.array([s.length for s in sequences], np.int32)
        positions = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
        row_of = np.repeat(np.arange(len(tokens)), counts)
        slots, tables = [], []
        for g in range(len(self.groups)):
            table = np.zeros((len(tokens), max(len(s.blocks[g]) for s in sequences) + 2), np.int32)
            for row, sequence in enumerate(sequences):
                table[row, : len(sequence.blocks[g])] = sequence.blocks[g]
            blocks = table[row_of, positions // self.block_size].astype(np.int64)
            slots.append(torch.from_numpy(blocks * self.block_size + positions % self.block_size))
            tables.append(torch.from_numpy(table))
        lens = (before + counts).astype(np.int32)
        return Batch(
            tokens=torch.tensor([t for row in tokens for t in row]),
            positions=torch.from_numpy(positions).long(),
            row_of=torch.from_numpy(row_of),
            q_start=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            seq_lens=torch.from_numpy(lens),
            slots=tuple(slots),
            tables=tuple(tables),
            logits_at=torch.arange(len(positions)),
            num_decode=int((counts == 1).sum()),
            max_q=int(counts.max()),
            max_kv=int(lens.max()),
            q_lens=counts,
            kv_lens=lens,
            kv=self.kv,
        )


def facts_for(config: Any, architecture: str, **changes: Any) -> ModelFacts:
    """Facts of a transformers config, for what the tests vary; `changes` win."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    facts: dict[str, Any] = {
        "path": "",
        "files": "none",
        "architecture": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope": RopeFacts(theta=config.rope_parameters["rope_theta"], rotary_dim=head_dim),
        "tie_embeddings": config.tie_word_embeddings,
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
    }
    return ModelFacts(**(facts | changes))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
