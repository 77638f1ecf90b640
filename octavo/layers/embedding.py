"""Token embeddings and the head, both split over ranks by the vocabulary; tied models use one for both."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.parallel import Vocabulary


class Head(Linear):
    """hidden [S, hidden] -> scores [S, vocab], joined from what each rank has scored."""

    def __init__(self, vocab_size: int, hidden: int, build: Build, part: str = "head") -> None:
        super().__init__(hidden, Vocabulary({part: vocab_size}), build)
        self._comm, self._vocab_size = build.comm, vocab_size
        self._first, self._last = self._reads[part].out

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.project(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        scores = super().__call__(hidden)
        if self._comm.size == 1:
            return scores
        run = -(-self._vocab_size // self._comm.size)
        if (short := run - scores.shape[1]) > 0:
            scores = F.pad(scores, (0, short))
        return self._comm.all_gather(scores)[:, : self._vocab_size].contiguous()


class Embedding(Head):
    """tokens [T] int64 -> [T, hidden], in the number format of matrices; `project` is the tied head.

    A rank looks up the tokens that it holds and has zeros for the others; the sum over ranks is exact.
    """

    def __init__(self, vocab_size: int, hidden: int, build: Build) -> None:
        super().__init__(vocab_size, hidden, build, "")

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._comm.size == 1:
            return self.gather(tokens)
        elsewhere = (tokens < self._first) | (tokens >= self._last)
        found = self.gather((tokens - self._first).masked_fill_(elsewhere, 0))
        return self._comm.all_reduce(found.masked_fill_(elsewhere.unsqueeze(1), 0))
