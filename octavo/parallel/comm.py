"""Communicators between the ranks of a tensor-parallel group."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """One rank's view of its group."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; x may be overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors joined along the last dimension, in rank order."""


class Single:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x
