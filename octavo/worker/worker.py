"""One rank's execution of plans: row state, the ragged batch, the model, sampling.

Owns the model's weights, the KV cache tensors and the row state of its device. Knows nothing of requests, queues or
block ownership: a plan says it all. `forward` and `sample` are apart because masks for sampling may still be on their
way while the forward runs, and because sampling is not inside the forward's graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.attention import Batch, KVCache, attn_specs, load_backend
from octavo.config.engine import EngineConfig
from octavo.config.kv import blocks_for
from octavo.core.plan import Int32s, Plan, StepResult
from octavo.core.request import TokenLogprobs
from octavo.kernels import load as load_kernels
from octavo.models import build_model
from octavo.sampling import Sampler, Samples, prompt_logprobs
from octavo.weights import load_weights
from octavo.worker.rows import RowState

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Forward:
    """A launched forward pass: the plan, its batch and the hidden states [T, hidden]."""

    plan: Plan
    batch: Batch
    hidden: Tensor
    starts: Int32s
    """[B] first position that each row computed."""


@dataclass(frozen=True)
class Step:
    """A launched and sampled step; `result` waits for the device."""

    tokens: Tensor
    num_tokens: Tensor
    samples: Samples
    first_sample: list[int]
    """Per sampled row where its entries in `samples` begin."""
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]]

    def result(self) -> StepResult:
        tokens = self.tokens.cpu().numpy().astype(np.int32)
        counts = self.num_tokens.cpu().numpy().astype(np.int32)
        entries = self.samples.host_logprobs()
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if entries:
            for i, (first, count) in enumerate(zip(self.first_sample, counts, strict=True)):
                if first in entries:
                    logprobs[i] = [entries[j] for j in range(first, first + int(count))]
        return StepResult(tokens, counts, logprobs, self.prompt_logprobs)


class Worker:
    """Executes plans in order on one device. Construction allocates nothing; `load` does."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def load(self, progress: Progress | None = None) -> None:
        """Reads the weights and allocates KV cache and row state. Errors of the checkpoint are ConfigError."""
        config, facts, cache = self.config, self.config.model, self.config.cache
        self._device = (
            torch.device("cuda", config.device.index) if config.device.kind == "cuda" else torch.device("cpu")
        )
        dtype: torch.dtype = getattr(torch, config.dtype)
        self._kernels = load_kernels(config.device.kind)
        self._attention = load_backend(self._kernels, attn_specs(facts, cache.block_size))
        self._model = build_model(
            facts,
            dtype=dtype,
            device=self._device,
            kernels=self._kernels,
            attention=self._attention,
            groups=cache.groups,
            block_size=cache.block_size,
        )
        load_weights(self._model, facts, load_format=config.load_format, seed=config.seed, progress=progress)
        scheduler = config.scheduler
        max_blocks = blocks_for(scheduler.max_model_len, cache.block_size)
        self._rows = RowState(scheduler.max_num_seqs, max_blocks, len(cache.groups), self._device)
        self._sampler = Sampler(
            facts.vocab_size, scheduler.max_num_seqs, facts.eos_token_ids, self._kernels, self._device
        )
        self._kv = self._allocate_kv(getattr(torch, cache.dtype))
        self._prompts: dict[int, tuple[int, list[int]]] = {}
        """Rows that want prompt log-probabilities: how many a position, and the prompt."""

    def _allocate_kv(self, dtype: torch.dtype) -> tuple[KVCache, ...]:
        """Per layer the cache tensor of its place in its group: layer j of every group shares tensor j."""
        cache, facts = self.config.cache, self.config.model
        shape = (cache.num_blocks, cache.block_size, facts.num_kv_heads, facts.head_dim)
        tensors = [KVCache(*(_zeros(shape, dtype, self._device) for _ in range(2))) for _ in cache.groups[0].layers]
        place = {layer: j for group in cache.groups for j, layer in enumerate(group.layers)}
        return tuple(tensors[place[layer]] for layer in range(facts.num_layers))

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Forward:
        """Applies the plan's changes and launches its forward pass."""
        for row in plan.retire:
            self._sampler.remove(row)
            self._prompts.pop(row, None)
        for admit in plan.admit:
            self._sampler.add(admit)
            self._prompts.pop(admit.row, None)
            if admit.params.prompt_logprobs is not None:
                assert admit.history is not None
                self._prompts[admit.row] = (admit.params.prompt_logprobs, admit.history[: admit.prompt_len])
        self._rows.apply(plan)
        batch, starts = self._prepare(plan)
        return Forward(plan, batch, self._model(batch), starts)

    def _prepare(self, plan: Plan) -> tuple[Batch, Int32s]:
        state, block_size = self._rows, self.config.cache.block_size
        counts = np.concatenate((np.ones(plan.num_decode, np.int32), plan.counts))
        starts = state.host_computed[plan.rows].astype(np.int32)
        kv_lens = starts + counts
        rows = self._tensor(plan.rows)
        ragged = self._kernels.prepare(
            rows,
            self._tensor(counts),
            plan.num_decode + plan.num_drafted,
            self._tensor(plan.tokens),
            state.last_token,
            state.num_computed,
        )
        max_kv = int(kv_lens.max())
        tables = tuple(table[rows, : blocks_for(max_kv, block_size)] for table in state.tables)
        batch = Batch(
            tokens=ragged.tokens,
            positions=ragged.positions,
            row_of=ragged.row_of,
            q_start=ragged.q_start,
            seq_lens=ragged.seq_lens,
            slots=tuple(self._kernels.slots(t, ragged.row_of, ragged.positions, block_size) for t in tables),
            tables=tables,
            logits_at=self._tensor(_logits_at(plan, counts)),
            num_decode=plan.num_decode,
            max_q=int(counts.max()),
            max_kv=max_kv,
            q_lens=counts,
            kv_lens=kv_lens,
            kv=self._kv,
        )
        meta = tuple(self._attention.plan(batch, group) for group in self.config.cache.groups)
        state.num_computed[rows] += self._tensor(counts)
        state.host_computed[plan.rows] += counts
        return replace(batch, meta=meta), starts

    def _tensor(self, array: Int32s) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device, non_blocking=True)

    @torch.inference_mode()
    def sample(self, forward: Forward) -> Step:
        """Samples the rows that reached their end, verifies drafts, and leaves the last tokens in the row state."""
        plan, batch = forward.plan, forward.batch
        if not plan.num_sampled:
            nothing = torch.zeros(0, 1, dtype=torch.int64)
            return Step(nothing, nothing[:, 0], Samples(nothing[:, 0]), [], self._prompt_logprobs(forward))
        num_plain, num_drafted = plan.num_decode, plan.num_drafted
        rows = plan.rows[: plan.num_sampled]
        repeats = np.ones(plan.num_sampled, np.int32)
        repeats[num_plain : num_plain + num_drafted] = plan.counts[:num_drafted]
        positions = batch.positions[batch.logits_at] + 1
        logits = self._model.logits(forward.hidden[batch.logits_at])
        samples = self._sampler(logits, np.repeat(rows, repeats), positions)
        first = np.cumsum(repeats) - repeats
        if num_drafted:
            tokens, counts, last = self._verify(samples.tokens, repeats, first, plan, forward.starts)
        else:
            tokens, last = samples.tokens[:, None], samples.tokens
            counts = torch.ones(plan.num_sampled, dtype=torch.int64)
        self._rows.last_token[self._tensor(rows)] = last
        self._sampler.observe(rows, last)
        return Step(tokens, counts, samples, first.tolist(), self._prompt_logprobs(forward))

    def _verify(
        self, sampled: Tensor, repeats: Int32s, first: Int32s, plan: Plan, starts: Int32s
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per sampled row its tokens [S, K+1], how many of them count [S], and the last one [S]."""
        width = int(repeats.max())
        at = np.minimum(first[:, None] + np.arange(width), first[:, None] + repeats[:, None] - 1)
        tokens = sampled[self._tensor(at)]
        begin, end = plan.num_decode, plan.num_decode + plan.num_drafted
        sizes = repeats[begin:end]
        drafts = np.zeros((len(sizes), width - 1), np.int32)
        drafts[np.arange(width - 1) < (sizes - 1)[:, None]] = plan.tokens[: int((sizes - 1).sum())]
        kept, last_of_drafted = self._kernels.verify(tokens[begin:end], self._tensor(drafts), self._tensor(sizes))
        counts = torch.ones(len(repeats), dtype=torch.int64, device=self._device)
        counts[begin:end] = kept
        last = tokens[:, 0].clone()
        last[begin:end] = last_of_drafted
        drafted = self._tensor(plan.rows[begin:end])
        self._rows.num_computed[drafted] = self._tensor(starts[begin:end]) + kept
        return tokens, counts, last

    def _prompt_logprobs(self, forward: Forward) -> dict[int, tuple[int, list[TokenLogprobs]]]:
        plan, batch = forward.plan, forward.batch
        found: dict[int, tuple[int, list[TokenLogprobs]]] = {}
        if not self._prompts:
            return found
        for i in range(plan.num_decode + plan.num_drafted, len(plan.rows)):
            start = int(forward.starts[i])
            k, prompt = self._prompts.get(int(plan.rows[i]), (0, []))
            targets = prompt[start + 1 : start + 1 + int(batch.q_lens[i])]
            begin = int(batch.q_lens[:i].sum())
            entries: list[TokenLogprobs] = []
            for j in range(0, len(targets), 128):
                chunk = targets[j : j + 128]
                logits = self._model.logits(forward.hidden[begin + j : begin + j + len(chunk)])
                entries += prompt_logprobs(logits, torch.tensor(chunk, device=self._device), k)
            if entries:
                found[i] = (start + 1, entries)
        return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory that the system hands out page by page when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def _logits_at(plan: Plan, counts: Int32s) -> Int32s:
    """Which tokens are projected: the only one of decode rows, all of drafted rows, the last of closing ones."""
    ends = np.cumsum(counts)
    first = plan.num_decode + plan.num_drafted
    drafted = np.arange(plan.num_decode, plan.num_decode + int(plan.counts[: plan.num_drafted].sum()))
    closing = ends[first : plan.num_sampled] - 1
    return np.concatenate((np.arange(plan.num_decode), drafted, closing)).astype(np.int32)
