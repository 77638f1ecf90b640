"""Steps of one token a row over fixed buffers, recorded: as CUDA graphs, or as tapes on a CPU.

A replay copies nothing: the record begins with `prepare_decode`, which reads the rows' state and fills the buffers that
the layers read. What varies between replays (rows, lengths, block tables) lies in device memory. The number of rows is
rounded up to a size, and a record is kept for each; rows beyond the step's are the padding row. The bound of lengths
that shapes a GPU's launch is the longest that a sequence may get: kernels take the true lengths from the device, and
tighter bounds measured no faster. Where recording takes long, a size's first steps run eagerly: it waits until the size
proves common, so it delays no first token. Owns the buffers and records, not the row state or the KV cache.
"""

from __future__ import annotations

import logging
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
from octavo.worker.recorder import Recorder, Unrecordable, size_class
from octavo.worker.rows import RowState, longest_first
from octavo.worker.staging import Uploader

logger = logging.getLogger("octavo")

Replay = tuple[Callable[[], None], Tensor]


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


class DecodeSteps:
    """Runs steps of up to all rows of `state`, recorded by the recorders, of which draws have one of their own.

    Without recorders every step runs eagerly, over the same buffers.
    """

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
        recorders: tuple[Recorder, Recorder] | None,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._groups, self._block_size, self._state, self._kv = groups, block_size, state, kv
        self._upload, self._sampler, self._max_length = upload, sampler, max_length
        device = state.last_token.device
        self._padding = state.last_token.shape[0] - 1
        most = size_class(self._padding)
        self._rows = torch.full((most,), self._padding, dtype=torch.int64, device=device)
        self._order = torch.zeros(most, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._next = torch.zeros(most, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots = torch.zeros(len(groups), most, dtype=torch.int64, device=device)
        self._index = torch.arange(most + 1, dtype=torch.int64, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._current, self._filled = np.zeros(0, np.int32), 0
        self._recorders = recorders
        self._seen: dict[int, int] = {}
        self._steps: dict[int, Replay | None] = {}
        self._draws: dict[tuple[int, bool], Replay | None] = {}
        """None: what cannot be recorded."""
        self._reasons: set[str] = set()

    def run(self, rows: Int32s) -> Decoded | None:
        """Computes the next token's logits of `rows` [B]. None, with nothing done, where that cannot be recorded."""
        count, size = len(rows), self._size(len(rows))
        self._set_rows(rows, size)
        if size not in self._steps and self._is_common(size):
            self._record_step(size)
        if size not in self._steps:
            logits = self._step(size)
        else:
            step = self._steps[size]
            if step is None:
                return None
            replay, logits = step
            replay()
        return Decoded(logits[:count], self._next[:count], self._rows[:count])

    def draw(self, rows: Int32s) -> Tensor | None:
        """Draws the tokens [B] of the step that `run` has just replayed, and leaves them in the row state as well.

        None when the step ran eagerly or a row asks for more than the plain draw. The next step overwrites the result.
        """
        size = self._size(len(rows))
        step = self._steps.get(size)
        if step is None or not self._sampler.is_plain(rows):
            return None
        self._sampler.refresh()
        key = (size, self._sampler.is_filtered(rows))
        if key not in self._draws:
            self._record_draw(step[1], *key)
        draw = self._draws[key]
        if draw is None:
            return None
        replay, tokens = draw
        replay()
        return tokens[: len(rows)]

    def _draw(self, logits: Tensor, size: int, filtered: bool) -> Tensor:
        last_token = self._state.last_token
        rows, positions = self._rows[:size], self._next[:size]
        return self._sampler.draw(logits, rows, positions, filtered=filtered, last_token=last_token)

    def warm_up(self) -> None:
        """Compiles and records every size, on padding rows alone."""
        if self._recorders is None:
            return
        nothing = np.zeros(0, np.int32)
        for size in sorted({self._size(rows) for rows in range(1, self._padding + 1)}, reverse=True):
            self._set_rows(nothing, size)
            if size not in self._steps:
                if self._recorders[0].eager_steps:
                    self._step(size)
                self._record_step(size)
            self.draw(np.full(size, self._padding, np.int32))

    def _size(self, rows: int) -> int:
        return size_class(rows) if self._recorders is None else self._recorders[0].size(rows)

    def _is_common(self, size: int) -> bool:
        """Whether it is time to record this size."""
        if self._recorders is None:
            return False
        seen = self._seen[size] = self._seen.get(size, 0) + 1
        return seen > self._recorders[0].eager_steps

    def _record_step(self, size: int) -> None:
        self._steps[size] = self._record(0, lambda: self._step(size))

    def _record_draw(self, logits: Tensor, size: int, filtered: bool) -> None:
        assert self._recorders is not None
        if self._recorders[1].eager_steps:
            self._draw(logits, size, filtered)  # compiles; recording computes nothing
        self._draws[size, filtered] = self._record(1, lambda: self._draw(logits, size, filtered))

    def _record(self, recorder: int, work: Callable[[], Tensor]) -> Replay | None:
        assert self._recorders is not None
        try:
            return self._recorders[recorder].record(work)
        except Unrecordable as error:
            if str(error) not in self._reasons:
                self._reasons.add(str(error))
                logger.info("decode steps are not recorded, so Python slows each of them: %s", error)
            return None

    def _set_rows(self, rows: Int32s, size: int) -> None:
        """Puts `rows` and their order into the buffers, padded to `size`; nothing to do while they stay the same."""
        if size == self._filled and np.array_equal(rows, self._current):
            return
        padded = np.full(size, self._padding, np.int64)
        padded[: len(rows)] = rows
        on_device, order_on_device = self._upload(padded, longest_first(self._state.host_computed[padded]))
        self._rows[:size].copy_(on_device)
        self._order[:size].copy_(order_on_device)
        self._current, self._filled = rows, size

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
            next_positions=self._next[:size],
            seq_lens=self._seq_lens[:size],
            slots=slots,
        )
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
            order=self._order[:size],
        )
        meta = tuple(self._attention.plan(batch, group) for group in self._groups)
        return self._model.logits(self._model(batch.with_meta(meta)))
