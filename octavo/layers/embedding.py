"""Token embeddings, which tied models also use as their head."""

from __future__ import annotations

from torch import Tensor

from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.parallel import Replicated


class Embedding(Linear):
    """tokens [T] int64 -> [T, hidden]. Every rank holds the whole table, in the number format of matrices."""

    def __init__(self, vocab_size: int, hidden: int, build: Build) -> None:
        super().__init__(hidden, Replicated({"": vocab_size}), build)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.gather(tokens)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> scores [S, vocab] of the tied head."""
        return super().__call__(hidden)
