"""Communicators: what of a GPU's sums goes where, and in which order ranks of a pipeline meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.config.parallel import place_of
from octavo.parallel import connect
from octavo.parallel.comm import CudaComm


class Group:
    """NCCL with one other rank, whose tensors are twice as large."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def wait(self) -> None: ...

    def allreduce(self, tensors: list[Tensor], options: Any) -> Group:
        assert not options.asyncOp, "a side stream would cost each sum of a graph two waits"
        tensors[0] *= 3
        return self

    def _allgather_base(self, found: Tensor, x: Tensor, options: Any) -> Group:
        assert not options.asyncOp
        found[0], found[1] = x, 2 * x
        return self


class Peers:
    """Takes float32 alone."""

    def all_reduce(self, x: Tensor) -> Tensor | None:
        return x + 100 if x.dtype is torch.float32 and x.is_contiguous() else None


def test_nccl_sums_what_peers_decline() -> None:
    x = torch.arange(6.0).view(2, 3)
    for peers in (None, Peers()):
        comm = CudaComm(Group(), peers)  # type: ignore[arg-type]
        assert torch.equal(comm.all_reduce(x.double()), 3 * x.double())
        assert torch.equal(comm.all_reduce(x.t().clone().t()), 3 * x if peers is None else x + 100)


def test_joins_stand_beside_each_other_in_rank_order() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(CudaComm(Group()).all_gather(x), torch.cat([x, 2 * x], -1))


def test_stages_meet_without_waiting_in_a_circle() -> None:
    store, cpu = dist.HashStore(), torch.device("cpu")  # type: ignore[attr-defined]

    def join(rank: int) -> None:
        pipe = connect(place_of(rank, 1, 4), store, cpu).pipe
        assert pipe is not None
        pipe.meet(cpu)

    with ThreadPoolExecutor(4) as threads:
        for rank in [threads.submit(join, rank) for rank in range(4)]:
            rank.result(20)
