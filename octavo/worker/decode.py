"""Steps of one token a row over fixed buffers, captured as CUDA graphs.

A replay copies nothing: the graph begins with `prepare_decode`, which reads the rows' state and fills the buffers that
the layers read. What varies between replays (rows, lengths, block tables) lies in device memory. The number of rows is
rounded up to a size, and a graph is kept for each; rows beyond the step's are the padding row. The bound of lengths
that shapes the launch is the longest that a sequence may get: kernels take the true lengths from the device, and
tighter bounds measured no faster. A size's first steps run eagerly; capturing waits until it proves common, so it
delays no first token. Owns the buffers and graphs, not the row state or the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.attention import AttentionBackend, Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.core.plan import Int32s
from octavo.kernels import Kernels
from octavo.sampling import Sampler
from octavo.worker.rows import RowState
from octavo.worker.staging import Uploader

EAGER_STEPS = 2
"""Steps of a size that run before it is captured; they also compile its kernels."""


class ForwardModel(Protocol):
    def __call__(self, batch: Batch) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decoded:
    """[B, hidden] is not kept: logits [B, vocab] and positions [B] of the tokens to be sampled, rows [B] on the device.

    All are overwritten by the next decode step.
    """

    logits: Tensor
    positions: Tensor
    rows: Tensor


def size_class(rows: int) -> int:
    """Rows that a step is padded to: 1, 2, 4, 8, then steps that grow with the size."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 16 if rows <= 128 else 32 if rows <= 512 else 64
    return -(-rows // step) * step


class DecodeSteps:
    """Runs steps of up to `max_rows` rows. `graphs` False runs them all eagerly, over the same buffers."""

    def __init__(
        self,
        model: ForwardModel,
        attention: AttentionBackend,
        kernels: Kernels,
        groups: tuple[KVGroup, ...],
        block_size: int,
        state: RowState,
        kv: tuple[KVCache, ...],
        upload: Uploader,
        sampler: Sampler,
        *,
        max_length: int,
        graphs: bool = True,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._groups, self._block_size, self._state, self._kv = groups, block_size, state, kv
        self._upload, self._sampler, self._max_length = upload, sampler, max_length
        device = state.last_token.device
        self._padding = state.last_token.shape[0] - 1
        most = size_class(self._padding)
        self._rows = torch.full((most,), self._padding, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._next = torch.zeros(most, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots = torch.zeros(len(groups), most, dtype=torch.int64, device=device)
        self._index = torch.arange(most + 1, dtype=torch.int64, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._current = np.zeros(0, np.int64)
        self._use_graphs = graphs and device.type == "cuda"
        self._seen: dict[int, int] = {}
        self._replays: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self._draws: dict[tuple[int, bool], tuple[Callable[[], None], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    def run(self, rows: Int32s) -> Decoded:
        """Computes the next token's logits of `rows` [B]."""
        size = size_class(len(rows))
        self._set_rows(rows, size)
        if size not in self._replays:
            seen = self._seen[size] = self._seen.get(size, 0) + 1
            if self._use_graphs and seen > EAGER_STEPS:
                self._replays[size] = self._capture(size)
        if size in self._replays:
            replay, logits = self._replays[size]
            replay()
        else:
            logits = self._step(size)
        count = len(rows)
        return Decoded(logits[:count], self._next[:count], self._rows[:count])

    def draw(self, rows: Int32s) -> Tensor | None:
        """Draws the tokens [B] of the step that `run` has just replayed, and leaves them in the row state as well.

        None when the step ran eagerly or a row asks for more than the plain draw. The next step overwrites the result.
        """
        size = size_class(len(rows))
        if size not in self._replays or not self._sampler.is_plain(rows):
            return None
        self._sampler.refresh()
        key = (size, self._sampler.is_filtered(rows))
        if key not in self._draws:
            logits = self._replays[size][1]
            self._draw(logits, *key)  # compiles; the capture below only records
            self._draws[key] = self._record(lambda: self._draw(logits, *key))
        replay, tokens = self._draws[key]
        replay()
        return tokens[: len(rows)]

    def _draw(self, logits: Tensor, size: int, filtered: bool) -> Tensor:
        last_token = self._state.last_token
        rows, positions = self._rows[:size], self._next[:size]
        return self._sampler.draw(logits, rows, positions, filtered=filtered, last_token=last_token)

    def warm_up(self) -> None:
        """Compiles and captures every size, on padding rows alone."""
        if not self._use_graphs:
            return
        nothing = np.zeros(0, np.int32)
        for size in sorted({size_class(rows) for rows in range(1, self._padding + 1)}, reverse=True):
            if size not in self._replays:
                self._set_rows(nothing, size)
                self._step(size)
                self._replays[size] = self._capture(size)
            self.draw(np.full(size, self._padding, np.int32))

    def _set_rows(self, rows: Int32s, size: int) -> None:
        """Puts `rows` into the buffer, padded to `size`; nothing to do while they stay the same."""
        padded = np.full(size, self._padding, np.int64)
        padded[: len(rows)] = rows
        if not np.array_equal(padded, self._current):
            self._rows[:size].copy_(self._upload(padded)[0])
            self._current = padded

    def _step(self, size: int) -> Tensor:
        state, rows = self._state, self._rows[:size]
        slots = self._slots[:, :size]
        self._kernels.prepare_decode(
            rows,
            state.last_token,
            state.num_computed,
            state.tables,
            self._block_size,
            tokens=self._tokens[:size],
            positions=self._positions[:size],
            seq_lens=self._seq_lens[:size],
            slots=slots,
        )
        torch.add(self._positions[:size], 1, out=self._next[:size])
        batch = Batch(
            tokens=self._tokens[:size],
            positions=self._positions[:size],
            row_of=self._index[:size],
            q_start=self._starts[: size + 1],
            seq_lens=self._seq_lens[:size],
            slots=tuple(slots),
            tables=(),
            logits_at=self._index[:size],
            num_decode=size,
            max_q=1,
            max_kv=self._max_length,
            q_lens=np.ones(size, np.int32),
            kv_lens=np.full(size, self._max_length, np.int32),
            kv=self._kv,
            rows=rows,
            row_tables=tuple(state.tables),
        )
        meta = tuple(self._attention.plan(batch, group) for group in self._groups)
        return self._model.logits(self._model(batch.with_meta(meta)))

    def _capture(self, size: int) -> tuple[Callable[[], None], Tensor]:
        return self._record(lambda: self._step(size))

    def _record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Captures `work`; what replays it, and the tensor that it returns."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            result = work()
            graph.capture_end()
        current.wait_stream(stream)
        return graph.replay, result
