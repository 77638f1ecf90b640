"""One stage of a pipeline, used like a whole model: it takes up the stream of the stage before and hands on its own.

Also owns the way back: the last stage's tokens reach the row state of the first before it needs them. Which plans are
in flight is the scheduler's business; stages run them in the same order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.attention import Batch
from octavo.core.plan import Int32s, Plan
from octavo.models import Model
from octavo.parallel import Pipe
from octavo.worker.rows import RowState
from octavo.worker.staging import Uploader


@dataclass(frozen=True)
class Owed:
    """Rows whose tokens are on their way back, on the host and on the device."""

    rows: Int32s
    at: Tensor


class Stage:
    """`model` has the stage's layers; `hidden` is the width of the stream."""

    def __init__(
        self, model: Model, pipe: Pipe, rows: RowState, upload: Uploader, hidden: int, dtype: torch.dtype
    ) -> None:
        self._model, self._pipe, self._rows, self._upload = model, pipe, rows, upload
        self._hidden, self._dtype = hidden, dtype
        self._owed: deque[Owed] = deque()

    @property
    def last(self) -> bool:
        return self._pipe.place.last

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] of the last stage, or the stream that was handed on."""
        stream = None
        if not self._pipe.place.first:
            shape = (batch.tokens.shape[0], self._hidden)
            stream = self._pipe.receive(torch.empty(shape, dtype=self._dtype, device=batch.tokens.device))
        out = self._model(batch, stream)
        if not self.last:
            self._pipe.send(out)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, vocab] in the last stage; the others have none and give back what they got."""
        return self._model.logits(hidden) if self.last else hidden

    def return_tokens(self, tokens: Tensor) -> None:
        """The last stage's tokens [S] of a plan's sampled rows go to the first."""
        self._pipe.send_tokens(tokens.contiguous())

    def expect_tokens(self, plan: Plan) -> None:
        """The first stage will take the plan's tokens; the stages between have no use for them."""
        if self._pipe.place.first and plan.num_sampled:
            rows = plan.rows[: plan.num_sampled]
            (at,) = self._upload(rows.astype(np.int64))
            self._owed.append(Owed(rows, at))

    def take_tokens(self, plan: Plan) -> None:
        """Before a plan runs: the tokens that its rows continue from are put into the row state.

        Those of plans that are longer ago than the pipeline holds are there, so they are taken as well.
        """
        continued = plan.rows[: plan.num_decode + plan.num_drafted]
        while self._owed and (
            len(self._owed) > self._pipe.place.stages or any(np.isin(owed.rows, continued).any() for owed in self._owed)
        ):
            owed = self._owed.popleft()
            self._rows.last_token[owed.at] = self._pipe.receive_tokens(torch.empty_like(owed.at))
