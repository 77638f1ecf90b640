"""One rank's execution of plans: row state, the ragged batch, the model, sampling.

Owns the model's weights, the KV cache tensors and the row state of its device. Knows nothing of requests, queues or
block ownership: a plan says it all. `forward` and `sample` are apart because masks for sampling may still be on their
way while the forward runs, and because sampling is not inside the forward's graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.attention import Batch, KVCache, attn_specs, load_backend
from octavo.config.engine import EngineConfig
from octavo.config.kv import blocks_for
from octavo.config.parallel import shard_of, stage_layers
from octavo.config.resolve import check_floats_fit
from octavo.core.plan import Int32s, Masks, Plan, StepResult
from octavo.core.request import TokenLogprobs
from octavo.kernels import load as load_kernels
from octavo.kernels.cpu import threads
from octavo.models import build_model
from octavo.parallel import ALONE, Links
from octavo.quant import scheme_for
from octavo.sampling import Sampler, Samples, prompt_logprobs
from octavo.weights import load_weights
from octavo.worker.decode import DecodeSteps, ForwardModel
from octavo.worker.layout import Int64s, Layout, lay_out
from octavo.worker.recorder import recorders_for
from octavo.worker.rows import RowState, longest_first
from octavo.worker.stage import Stage
from octavo.worker.staging import DEPTH, Download, Downloader, Span, StepClock, Uploader

Progress = Callable[[str, int, int], None]
PROMPT_SLICE = 128
"""Prompt tokens whose log-probabilities are computed together; bounds the memory of their logits."""


@dataclass(frozen=True)
class Forward:
    """A launched forward pass and what sampling needs of it."""

    plan: Plan
    logits: Tensor
    """[S, vocab] of the tokens to sample after."""
    positions: Tensor
    """[S] int64 positions that the sampled tokens will have."""
    rows: Tensor
    """[B] int64 rows of the batch, on the device; the sampled ones stand first."""
    layout: Layout | None = None
    """None: a step of one token a row."""
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """A launched and sampled step; `result` waits for the device."""

    download: Download
    """Tokens [S, K+1], log-probabilities where asked for, and with drafts how many tokens count [S]."""
    samples: Samples
    first_sample: Sequence[int]
    """Per sampled row where its entries in `samples` begin."""
    counts: Tensor | None
    """None: one token a row."""
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]]
    span: Span

    def result(self) -> StepResult:
        tokens, *gathered = self.download.wait()
        num_tokens = np.ones(len(tokens), np.int32)
        if self.counts is not None:
            num_tokens = gathered.pop().numpy().astype(np.int32)
        entries = self.samples.host_logprobs(gathered)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if entries:
            for i, (first, count) in enumerate(zip(self.first_sample, num_tokens, strict=True)):
                if first in entries:
                    logprobs[i] = [entries[j] for j in range(first, first + int(count))]
        busy, idle = self.span.seconds()
        return StepResult(tokens.numpy().astype(np.int32), num_tokens, logprobs, self.prompt_logprobs, busy, idle)


class Worker:
    """Executes plans in order on one device, with the ranks that `links` lead to. Construction allocates nothing.

    Steps of one token a row run over fixed buffers (`decode`), recorded unless `record` is off; all others are laid out
    anew.
    """

    def __init__(self, config: EngineConfig, links: Links = ALONE, *, record: bool = True) -> None:
        self.config, self._links = config, links
        self._record = record

    def load(self, progress: Progress | None = None) -> None:
        """Reads the weights and allocates KV cache and row state. Errors of the checkpoint are ConfigError."""
        config, facts, cache, scheduler = self.config, self.config.model, self.config.cache, self.config.scheduler
        device = config.device
        self._device = torch.device("cuda", device.index) if device.kind == "cuda" else torch.device("cpu")
        self._kernels = load_kernels(device.kind)
        dtype: torch.dtype = getattr(torch, config.dtype)
        comm, pipe, place = self._links.comm, self._links.pipe, self._links.place
        if device.kind == "cpu":
            threads.set_up(*self._links.neighbours)
        self._layers = stage_layers(facts, place.stages)[place.stage]
        specs = attn_specs(shard_of(facts, comm.size), cache.block_size)
        scheme = scheme_for(
            config.quantization,
            files="none" if config.load_format == "dummy" else facts.files,
            device_kind=device.kind,
            dtype=dtype,
        )
        if config.quantization == "auto" and not scheme.keeps:
            check_floats_fit(config)
        self._attention = load_backend(self._kernels, specs, self._device, dtype)
        model = build_model(
            facts,
            dtype=dtype,
            device=self._device,
            kernels=self._kernels,
            attention=self._attention,
            groups=cache.groups,
            block_size=cache.block_size,
            scheme=scheme,
            comm=comm,
            layers=self._layers,
        )
        load_weights(
            model,
            facts,
            load_format=config.load_format,
            seed=config.seed,
            progress=progress,
            keep=scheme.keeps,
        )
        max_blocks = blocks_for(scheduler.max_model_len, cache.block_size)
        self._upload = Uploader(self._device)
        kept = max(DEPTH, scheduler.depth + 2)  # the steps in flight, the one launched and the one before them
        self._clock, self._download = StepClock(self._device, kept), Downloader(self._device, kept)
        self._rows = RowState(scheduler.max_num_seqs, max_blocks, len(cache.groups), self._kernels, self._device)
        self._stage = None if pipe is None else Stage(model, pipe, self._rows, self._upload, facts.hidden_size, dtype)
        self._model: ForwardModel = self._stage or model
        self._sampler = Sampler(
            facts.vocab_size, scheduler.max_num_seqs, facts.eos_token_ids, self._kernels, self._device
        )
        self._kv = self._allocate_kv(getattr(torch, cache.dtype))
        self._prompts: dict[int, tuple[int, list[int]]] = {}
        """Rows that want prompt log-probabilities: how many a position, and the prompt."""
        self._decode: DecodeSteps | None = None
        recorders = recorders_for(self._device, dtype) if self._attention.replays else None
        if recorders is not None and (self._links is ALONE or device.kind == "cuda"):  # no tape records what gloo does
            self._decode = DecodeSteps(
                self._model,
                self._attention,
                self._kernels,
                cache.groups,
                cache.block_size,
                self._rows,
                self._kv,
                self._upload,
                self._sampler,
                max_length=scheduler.max_model_len,
                recorders=recorders if self._record else None,
            )

    def warm_up(self) -> None:
        """Compiles and captures what decode steps of any size need, so that no step waits for it."""
        if self._decode is not None:
            with torch.inference_mode():
                self._decode.warm_up()

    def _allocate_kv(self, dtype: torch.dtype) -> tuple[KVCache, ...]:
        """Per layer the cache tensor of its place in its group: layer j of every group shares tensor j.

        A layer of another stage has none and gets any of them, so that plans of its group find a tensor to look at.
        """
        cache, facts = self.config.cache, shard_of(self.config.model, self._links.comm.size)
        shape = (cache.num_blocks, cache.block_size, facts.num_kv_heads, facts.head_dim)
        place = {layer: j for group in cache.groups for j, layer in enumerate(group.layers)}
        tensors = {
            j: KVCache(*(_zeros(shape, dtype, self._device) for _ in range(2)))
            for j in sorted({place[layer] for layer in self._layers})
        }
        any_tensor = next(iter(tensors.values()))
        return tuple(tensors.get(place[layer], any_tensor) for layer in range(facts.num_layers))

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Forward:
        """Applies the plan's changes and launches its forward pass."""
        self._clock.begin()
        if self._stage is not None:
            self._stage.take_tokens(plan)
        for row in plan.retire:
            self._sampler.remove(row)
            self._prompts.pop(row, None)
        for admit in plan.admit:
            self._sampler.add(admit)
            self._prompts.pop(admit.row, None)
            if admit.params.prompt_logprobs is not None:
                assert admit.history is not None
                self._prompts[admit.row] = (admit.params.prompt_logprobs, admit.history[: admit.prompt_len])
        self._rows.apply(plan, self._upload)
        if self._decode is not None and plan.num_decode == len(plan.rows):
            decoded = self._decode.run(plan.rows)
            if decoded is not None:
                self._rows.host_computed[plan.rows] += 1
                return Forward(plan, decoded.logits, decoded.positions, decoded.rows)
        layout = lay_out(plan, self._rows.host_computed)
        self._rows.host_computed[plan.rows] += layout.counts
        batch, rows = self._batch(plan, layout)
        hidden, count = self._model(batch), len(layout.logits_at)
        ends = hidden[:count] if batch.ends is not None else hidden[batch.logits_at]
        positions = batch.positions[batch.logits_at[:count]] + 1
        return Forward(plan, self._model.logits(ends), positions, rows, layout, hidden)

    def _batch(self, plan: Plan, layout: Layout) -> tuple[Batch, Tensor]:
        """The ragged batch and its rows on the device; the rows' num_computed moves past it."""
        state, block_size = self._rows, self.config.cache.block_size
        kv_lens = layout.kv_lens
        ends = layout.ends if self.samples and not self._prompts and not plan.num_drafted else None
        tokens, from_state, positions, row_of, q_start, logits_at, rows, seq_lens, order = self._upload(
            layout.tokens,
            layout.from_state,
            layout.positions,
            layout.row_of,
            layout.q_start,
            layout.logits_at if ends is None else ends,
            plan.rows.astype(np.int64),
            kv_lens,
            longest_first(kv_lens[: plan.num_decode]),
        )
        if len(layout.from_state):
            tokens[from_state] = state.last_token[rows[: len(layout.from_state)]]
        batch = Batch(
            tokens=tokens,
            positions=positions,
            row_of=row_of,
            q_start=q_start,
            seq_lens=seq_lens,
            slots=tuple(self._kernels.slots(table, rows[row_of], positions, block_size) for table in state.tables),
            tables=(),
            logits_at=logits_at,
            num_decode=plan.num_decode,
            max_q=int(layout.counts.max()),
            max_kv=int(kv_lens.max()),
            q_lens=layout.counts,
            kv_lens=kv_lens,
            kv=self._kv,
            rows=rows,
            row_tables=tuple(state.tables),
            order=order,
        )
        state.num_computed[rows] = seq_lens.long()
        batch = self._planned(batch)
        return (batch if ends is None else replace(batch, ends=self._ends(batch, layout, ends))), rows

    def _planned(self, batch: Batch) -> Batch:
        return batch.with_meta(tuple(self._attention.plan(batch, group) for group in self.config.cache.groups))

    def _ends(self, batch: Batch, layout: Layout, ends: Int64s) -> Batch:
        """The tokens at `ends`, on the device `batch.logits_at`, as rows of one token each."""
        at, count, kv_lens = batch.logits_at, len(ends), (layout.positions[ends] + 1).astype(np.int32)
        index, q_start, seq_lens, order = self._upload(
            np.arange(count), np.arange(count + 1, dtype=np.int32), kv_lens, longest_first(kv_lens)
        )
        assert batch.rows is not None
        return self._planned(
            Batch(
                tokens=batch.tokens[at],
                positions=batch.positions[at],
                row_of=index,
                q_start=q_start,
                seq_lens=seq_lens,
                slots=tuple(slots[at] for slots in batch.slots),
                tables=(),
                logits_at=index,
                num_decode=count,
                max_q=1,
                max_kv=int(kv_lens.max()),
                q_lens=np.ones(count, np.int32),
                kv_lens=kv_lens,
                kv=batch.kv,
                rows=batch.rows[batch.row_of[at]],
                row_tables=batch.row_tables,
                order=order,
            )
        )

    @property
    def samples(self) -> bool:
        """Whether this rank is of the stage that samples; the others call `expect` instead of `sample`."""
        return self._stage is None or self._stage.last

    @torch.inference_mode()
    def expect(self, forward: Forward) -> None:
        """The step is being sampled in the last stage."""
        assert self._stage is not None
        self._stage.expect_tokens(forward.plan)

    @torch.inference_mode()
    def sample(self, forward: Forward, masks: Masks | None = None) -> Step:
        """Samples the rows that reached their end, verifies drafts, and leaves the last tokens in the row state."""
        plan, layout = forward.plan, forward.layout
        rows = plan.rows[: plan.num_sampled]
        last_token = self._rows.last_token
        if layout is None or not plan.num_drafted:
            plain = layout is None and masks is None
            drawn = self._decode.draw(rows) if plain and self._decode is not None else None
            samples = (
                Samples(drawn)
                if drawn is not None
                else self._sampler(
                    forward.logits,
                    rows,
                    forward.positions,
                    index=forward.rows[: len(rows)],
                    last_token=last_token,
                    masks=masks,
                )
            )
            self._sampler.observe(rows, samples.tokens)
            return self._step(forward, samples, [samples.tokens[:, None]], range(len(rows)), None)
        first = np.cumsum(layout.repeats) - layout.repeats
        if masks is not None:
            masks = Masks(first[masks.lines], masks.bits)
        samples = self._sampler(forward.logits, np.repeat(rows, layout.repeats), forward.positions, masks=masks)
        tokens, counts, last = self._verify(samples.tokens, first, plan, layout)
        last_token[forward.rows[: len(rows)]] = last
        self._sampler.observe(rows, last)
        return self._step(forward, samples, [tokens], first.tolist(), counts)

    def _step(
        self, forward: Forward, samples: Samples, tokens: list[Tensor], first: Sequence[int], counts: Tensor | None
    ) -> Step:
        """Starts the results on their way to the host, and to the first stage."""
        if self._stage is not None and len(first):
            self._stage.return_tokens(self._rows.last_token[forward.rows[: len(first)]])
        download = self._download([*tokens, *samples.gathered, *([] if counts is None else [counts])])
        span = self._clock.end(download.event)
        return Step(download, samples, first, counts, self._prompt_logprobs(forward), span)

    def _verify(self, sampled: Tensor, first: Int32s, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Per sampled row its tokens [S, K+1], how many of them count [S], and the last one [S]."""
        repeats = layout.repeats
        width = int(repeats.max())
        begin, end = plan.num_decode, plan.num_decode + plan.num_drafted
        sizes = repeats[begin:end]
        drafts = np.zeros((len(sizes), width - 1), np.int64)
        drafts[np.arange(width - 1) < (sizes - 1)[:, None]] = plan.tokens[: int((sizes - 1).sum())]
        at = np.minimum(first[:, None] + np.arange(width), (first + repeats - 1)[:, None])
        where, proposed, counted, rows, starts = self._upload(
            at.astype(np.int64),
            drafts,
            sizes.astype(np.int64),
            plan.rows[begin:end].astype(np.int64),
            layout.starts[begin:end].astype(np.int64),
        )
        tokens = sampled[where]
        kept, last_of_drafted = self._kernels.verify(tokens[begin:end], proposed, counted)
        counts = torch.ones(len(repeats), dtype=torch.int64, device=self._device)
        counts[begin:end] = kept
        last = tokens[:, 0].clone()
        last[begin:end] = last_of_drafted
        self._rows.num_computed[rows] = starts + kept
        return tokens, counts, last

    def _prompt_logprobs(self, forward: Forward) -> dict[int, tuple[int, list[TokenLogprobs]]]:
        plan, layout, hidden = forward.plan, forward.layout, forward.hidden
        found: dict[int, tuple[int, list[TokenLogprobs]]] = {}
        if not self._prompts or layout is None or hidden is None:
            return found
        for i in range(plan.num_decode + plan.num_drafted, len(plan.rows)):
            start, begin = int(layout.starts[i]), int(layout.q_start[i])
            k, prompt = self._prompts.get(int(plan.rows[i]), (0, []))
            targets = prompt[start + 1 : start + 1 + int(layout.counts[i])]
            entries: list[TokenLogprobs] = []
            for j in range(0, len(targets), PROMPT_SLICE):
                chunk = targets[j : j + PROMPT_SLICE]
                logits = self._model.logits(hidden[begin + j : begin + j + len(chunk)])
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
