"""Token embeddings, which tied models also use as their head."""

from __future__ import annotations

from torch import Tensor

from octavo.layers.build import Build, OneTensor


class Embedding(OneTensor):
    """tokens [T] int64 -> [T, hidden]. Every rank holds the whole table."""

    def __init__(self, vocab_size: int, hidden: int, build: Build) -> None:
        super().__init__(build.empty(vocab_size, hidden))
        self._kernels = build.kernels

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._kernels.embedding(tokens, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> scores [S, vocab] of the tied head."""
        return self._kernels.linear(hidden, self.weight, None)
