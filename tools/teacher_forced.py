"""Measures what a number format costs in quality: a model's predictions on given tokens against its own in float32.

python tools/teacher_forced.py [--model M] [--dtype float32] [--quantization native] [--prompts 8] [TOKENS.json]

TOKENS.json holds {"prompts": [{"prompt_ids": [...], "tokens": [...]}, ...]}; every position of `tokens` is compared:
how often the best token is the same, the mean Kullback-Leibler divergence from float32's distribution, and the ratio of
the perplexities of the tokens. Free-running text is no such measure: one early difference changes all that follows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from octavo.attention import Batch, KVCache, attn_specs, load_backend
from octavo.config.kv import blocks_for, kv_groups
from octavo.core.facts import ModelFacts
from octavo.formats import locate, read_facts
from octavo.kernels import load
from octavo.models import build_model
from octavo.quant import Quantization, scheme_for
from octavo.weights import load_weights

BLOCK = 16
CPU = torch.device("cpu")
TOKENS = Path(__file__).parents[1] / "tests" / "fixtures" / "smollm2-greedy.json"


class Forced:
    """A model that is fed whole sequences."""

    def __init__(self, facts: ModelFacts, dtype: torch.dtype, quantization: Quantization) -> None:
        self.facts, self.dtype = facts, dtype
        self.groups = kv_groups(facts)
        kernels, specs = load("cpu"), attn_specs(facts, BLOCK)
        self.attention = load_backend(kernels, specs, CPU, dtype)
        scheme = scheme_for(quantization, files=facts.files, device_kind="cpu", dtype=dtype)
        self.model = build_model(
            facts,
            dtype=dtype,
            device=CPU,
            kernels=kernels,
            attention=self.attention,
            groups=self.groups,
            block_size=BLOCK,
            scheme=scheme,
        )
        load_weights(self.model, facts, load_format="auto", seed=0, keep=scheme.keeps)

    @torch.inference_mode()
    def log_probs(self, tokens: list[int], first: int) -> Tensor:
        """[len(tokens) - first, vocab] float32 of what follows each token from position `first` on."""
        count, facts = len(tokens), self.facts
        blocks = blocks_for(count, BLOCK)
        shape = (blocks + 1, BLOCK, facts.num_kv_heads, facts.head_dim)
        positions = torch.arange(count)
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=positions,
            row_of=torch.zeros(count, dtype=torch.int64),
            q_start=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([count], dtype=torch.int32),
            slots=tuple(positions + BLOCK for _ in self.groups),
            tables=tuple(torch.arange(1, blocks + 1, dtype=torch.int32)[None] for _ in self.groups),
            logits_at=positions[first:],
            num_decode=0,
            max_q=count,
            max_kv=count,
            q_lens=np.array([count], np.int32),
            kv_lens=np.array([count], np.int32),
            kv=tuple(KVCache(*torch.zeros(2, *shape, dtype=self.dtype)) for _ in range(facts.num_layers)),
        )
        hidden = self.model(batch.with_meta(tuple(self.attention.plan(batch, group) for group in self.groups)))
        return self.model.logits(hidden[batch.logits_at]).float().log_softmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tokens", nargs="?", type=Path, default=TOKENS)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", choices=get_args(Quantization), default="native")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the file's prompts")
    args = parser.parse_args()
    facts = read_facts(locate(args.model))
    exact = Forced(facts, torch.float32, "none")
    tested = Forced(facts, getattr(torch, args.dtype), args.quantization)
    same, divergence, losses = [], [], []
    for prompt in json.loads(args.tokens.read_text())["prompts"][: args.prompts]:
        fed, targets = prompt["prompt_ids"] + prompt["tokens"][:-1], torch.tensor(prompt["tokens"])
        first = len(prompt["prompt_ids"]) - 1
        wanted, got = exact.log_probs(fed, first), tested.log_probs(fed, first)
        same.append(got.argmax(1) == wanted.argmax(1))
        divergence.append((wanted.exp() * (wanted - got)).sum(1))
        losses.append((wanted - got).gather(1, targets[:, None]))
    positions = torch.cat(same)
    print(
        f"{args.dtype} {args.quantization}, {len(positions)} positions: best token equal {positions.float().mean():.1%}"
        f", divergence {torch.cat(divergence).mean():.5f} nats, perplexity x {torch.cat(losses).mean().exp():.4f}"
    )


if __name__ == "__main__":
    main()
