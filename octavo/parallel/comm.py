"""Communicators between the ranks of one engine: sums and joins within a layer, hidden states from stage to stage.

`connect` builds a rank's links over torch.distributed's process groups, without its global state, so that engines (or
ranks as threads of one process) do not meet. gloo serves CPUs, over the loopback device unless ranks are on several
machines, and NCCL serves GPUs, with `peer_memory` for small sums. Does not own processes (`engine`) or what is sent
when (`worker`).
"""

from __future__ import annotations

import os
import socket
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from octavo.config.parallel import Place
from octavo.parallel.peer_memory import PeerMemory, Rows, share

dist: Any = torch.distributed
"""Its types leave out most of what is used here."""
HOST = "127.0.0.1"
FOREVER = timedelta(days=1)
"""Ranks wait for each other as long as it takes: one that dies is noticed by its connection, or by its process."""
NCCL = {
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # threads of torch's that would end the process when a peer dies
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""Variables that are set before NCCL's first group, unless they are set."""


class Comm(Protocol):
    """One rank's view of the ranks that share its layers."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each; x may be overwritten."""

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(rms_norm(s), s) of s = residual + all_reduce(x), all [T, n], where that is one kernel; None elsewhere."""

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors joined along the last dimension, in rank order."""


class Single:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        return None

    def all_gather(self, x: Tensor) -> Tensor:
        return x


class GlooComm:
    """Ranks on CPUs. A sum adds in rank order, whatever the batch, and rounds half types once."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._collect(x)
        total = first.float() if first.dtype in (torch.bfloat16, torch.float16) else first
        for other in others:
            total += other
        return total.to(x.dtype)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        return None

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._collect(x), -1)

    def _collect(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([found], [x]).wait()
        return found


class CudaComm:
    """Ranks on GPUs. Nothing waits on the host, so steps can be captured as CUDA graphs.

    NCCL works on the current stream, and sums what `peers` declines. Of more than two ranks its sums may be rounded in
    another order; they, too, are the same on each.
    """

    def __init__(self, group: Any, peers: PeerMemory | None = None) -> None:
        self._group, self._peers = group, peers
        self.rank, self.size = group.rank(), group.size()
        self._sum, self._join = dist.AllreduceOptions(), dist.distributed_c10d.AllgatherOptions()
        # On the current stream: nothing is returned to wait for.
        self._sum.asyncOp = self._join.asyncOp = False

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self._peers is not None and (summed := self._peers.all_reduce(x)) is not None:
            return summed
        self._group.allreduce([x], self._sum)
        return x

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        return None if self._peers is None else self._peers.add_norm(x.contiguous(), residual, weight, eps)

    def all_gather(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.size, *x.shape)
        self._group._allgather_base(found, x.contiguous(), self._join)
        return found.movedim(0, -2).flatten(-2)

    def meet(self, device: torch.device) -> None:
        """Connects now, when all are here: a graph cannot, and later one may come too late for the store's patience."""
        self._group.allreduce([torch.zeros(1, device=device)], self._sum)


class Pipe:
    """A rank's line through the stages: hidden states go down it, sampled tokens come back to its beginning.

    They use groups of their own: one waits for the other's steps, and a group works in order. The host waits for no
    receiver: no more plans than one for each stage and one ahead are on their way.
    """

    def __init__(self, stream: Any, tokens: Any, place: Place) -> None:
        self._stream, self._tokens, self.place = stream, tokens, place
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def receive(self, into: Tensor) -> Tensor:
        """The stream of the stage before."""
        self._stream.recv([into], self.place.stage - 1, 0).wait()
        return into

    def send(self, stream: Tensor) -> None:
        """To the stage behind. A GPU's stream waits until it is taken, so that a graph can capture it."""
        work = self._stream.send([stream], self.place.stage + 1, 0)
        if stream.is_cuda:
            work.wait()
        else:
            self._keep(work, stream)

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage to the first, beside what runs: the first takes them late, and sends before it does."""
        self._keep(self._tokens.send([tokens], 0, 1), tokens)

    def receive_tokens(self, into: Tensor) -> Tensor:
        """What the last stage has sampled. On a GPU a receiver takes processors from what runs until they arrive."""
        self._tokens.recv([into], self.place.stages - 1, 1).wait()
        return into

    def meet(self, device: torch.device) -> None:
        """Connects every pair of ranks that will talk: down the stages, then from the last to the first."""
        nothing, place = torch.zeros(1, device=device), self.place
        if not place.first:
            self.receive(nothing)
        if not place.last:
            self.send(nothing)
        if place.last:
            self.send_tokens(nothing)
        if place.first:
            self.receive_tokens(nothing)

    def _keep(self, work: Any, tensor: Tensor) -> None:
        """Holds the tensor while it is on its way; what so many plans ago was sent has arrived."""
        self._sent.append((work, tensor))
        if len(self._sent) > self.place.stages + 2:
            self._sent.popleft()[0].wait()


@dataclass(frozen=True)
class Links:
    """One rank's connections."""

    place: Place
    comm: Comm
    pipe: Pipe | None
    """None: one stage."""
    groups: tuple[Any, ...] = ()
    """What `abort` ends, in this order."""
    neighbours: tuple[int, int] = (0, 1)
    """(index, count): which of the ranks on its machine this is."""

    def abort(self) -> None:
        """Ends all connections, and what a device waits for. From any thread; nothing works afterwards."""
        for group in self.groups:
            group.abort()


ALONE = Links(Place(0, 1, 0, 1), Single(), None)


def open_store(host: str = HOST) -> Any:
    """Where ranks find each other: rank 0 opens it on a free `port` of its address `host`, and on no other address."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(host: str, port: int) -> Any:
    return dist.TCPStore(host, port, is_master=False)


def connect(
    place: Place,
    store: Any,
    device: torch.device,
    host: str = HOST,
    neighbours: tuple[int, int] | None = None,
    sums: Rows | None = None,
) -> Links:
    """Links of the rank at `place` with all others, which must connect as well, over a store that all of them see.

    `host` is the address at which the others reach this rank; without `neighbours` all ranks are on one machine.
    `sums` may be made over peers' memory.
    """

    groups: list[Any] = []

    def group(name: str, rank: int, size: int) -> Any:
        groups.append(_group(dist.PrefixStore(name, store), rank, size, device, host))
        return groups[-1]

    comm: Comm = Single()
    if place.shards > 1:
        name = f"stage {place.stage}"
        shards = group(name, place.shard, place.shards)
        if device.type == "cuda":
            memory = dist.PrefixStore(f"{name} memory", store)
            peers = None if sums is None else share(memory, place.shard, place.shards, device, sums)
            if peers is not None:
                groups.insert(0, peers)
            comm = CudaComm(shards, peers)
            comm.meet(device)
        else:
            comm = GlooComm(shards)
    pipe = None
    if place.stages > 1:
        stream, tokens = (group(f"{what} {place.shard}", place.stage, place.stages) for what in ("stream", "tokens"))
        pipe = Pipe(stream, tokens, place)
        if device.type == "cuda":
            pipe.meet(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    here = neighbours or (place.stage * place.shards + place.shard, place.stages * place.shards)
    return Links(place, comm, pipe, tuple(groups), here)


def _group(store: Any, rank: int, size: int, device: torch.device, host: str) -> Any:
    if device.type == "cuda":
        for variable, value in NCCL.items():
            os.environ.setdefault(variable, value)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = FOREVER
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = FOREVER
    return dist.ProcessGroupGloo(store, rank, size, gloo)
