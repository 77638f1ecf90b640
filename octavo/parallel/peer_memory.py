"""Sums over memory that the GPUs of one machine map from each other: a third of NCCL's time for a decode step's sums.

Owns the shared memory, the decision, which all ranks take alike, whether there is any, and which sums go over it; the
others go through NCCL (`comm`). Our own kernel (`kernels.cuda.peer_sum`) adds the residual and normalises as well; of
more than two ranks it makes small sums, and torch's, without NVLink multicast, the larger ones. Both add in rank order,
so every rank gets the same bits.

A call waits on the device for the same call of every other rank, eagerly or in a CUDA graph, and has no timeout.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("octavo")

RANKS = (2, 4, 8)
"""Numbers of ranks that torch's kernels are unrolled for."""
TWO_SHOT_DTYPES = (torch.bfloat16, torch.float32)
DTYPES = (*TWO_SHOT_DTYPES, torch.float16)
ALIGNMENT = 16
"""Bytes that a thread loads at once, of which torch's kernel wants multiples."""
ONE_SHOT_READ = 1 << 20
"""Bytes read from several others up to which one shot is faster: two shots read 2 / ranks of it, but wait twice and
copy once more. From one other rank either way reads the same."""
LARGEST = 16 << 20
"""Bytes beyond which two shots leave the link to NCCL, which keeps more of the GPU busy with it."""
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Variable by which torch, for tests, lets ranks share a GPU."""
CHECK_SECONDS = 10.0
ABORT_SECONDS = 1.0

_meetings = 0
"""How many times this process has shared memory: torch numbers them, and peers meet under the same number. FAILED once
that number is uncertain."""
FAILED = -1


@dataclass(frozen=True)
class Rows:
    """What is summed: at most `most` rows of `width` elements."""

    most: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.most * self.width * self.dtype.itemsize


class Way(Enum):
    """How a sum is made."""

    ONE_SHOT = "every rank reads the others' rows and adds them all"
    TWO_SHOT = "every rank adds its part of all rows, then reads the other parts"


def way(size: int, dtype: torch.dtype, ranks: int) -> Way | None:
    """How `ranks` ranks sum rows of `size` bytes together; None: not over their memory."""
    if ranks == 2 or (ranks - 1) * size <= ONE_SHOT_READ:
        return Way.ONE_SHOT
    fits = size <= LARGEST and size % ALIGNMENT == 0 and dtype in TWO_SHOT_DTYPES
    return Way.TWO_SHOT if fits else None


class Offer(msgspec.Struct, frozen=True):
    """What a rank says of itself before memory is shared."""

    machine: str
    device: int
    reach: tuple[int, ...]
    """Devices whose memory it can map."""
    meetings: int
    overlap: bool = False


def obstacle(offers: Sequence[Offer]) -> str | None:
    """Why these ranks cannot share memory, None if they can; the same answer on each."""
    if len(offers) not in RANKS:
        return f"{len(offers)} ranks, not {', '.join(map(str, RANKS))}"
    if len({offer.machine for offer in offers}) > 1:
        return "ranks are on several machines"
    if any(offer.meetings == FAILED for offer in offers):
        return "sharing failed before in one of the processes"
    if all(offer.overlap for offer in offers):
        return None
    devices = [offer.device for offer in offers]
    if len(set(devices)) < len(devices):
        return f"ranks name their devices {devices}"
    for offer in offers:
        if missing := set(devices) - {offer.device, *offer.reach}:
            return f"device {offer.device} cannot map the memory of {sorted(missing)}"
    return None


class PeerMemory:
    """This rank's view of the ranks' memory for sums of `rows`. Made by `share`."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, rows: Rows) -> None:
        from octavo.kernels.cuda.peer_sum import PROGRAMS

        global _meetings
        self._rank, self._size, self._device, self._rows = rank, size, device, rows
        self._name = f"octavo-{_meetings}"
        # torch finds the store of a meeting through a registered group, which its registry does not keep alive.
        self._group = _c10d().ProcessGroup(store, rank, size)
        self._group._set_group_name(self._name)
        _c10d()._register_process_group(self._name, self._group)
        self._memory, handle = self._map(8 * size * PROGRAMS + 2 * rows.nbytes)
        told = [handle.get_buffer(peer, (size, PROGRAMS), torch.int64) for peer in range(size)]
        self._told = told[rank]
        self._addresses = [words.data_ptr() for words in told]
        """Of each rank what it was told; its rows lie behind."""
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
        self._signals: list[Tensor] = []
        """Of torch's kernels, for each rank [blocks, ranks]: its sender sets a word, its receiver clears it."""
        if way(rows.nbytes, rows.dtype, size) is not Way.ONE_SHOT:
            self._buffer, handle = self._map(min(rows.nbytes, LARGEST))
            pads = [handle.get_signal_pad(peer, dtype=torch.int32) for peer in range(size)]
            self._signals = [pad[: pad.numel() // size * size].view(-1, size) for pad in pads]
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        _meetings += 1

    def _map(self, nbytes: int) -> tuple[Tensor, Any]:
        """Zeros of this rank, and the handle that leads to the other ranks'; both end with the tensor."""
        memory = _c10d()._SymmetricMemory
        buffer: Tensor = memory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device).zero_()
        torch.cuda.synchronize(self._device)
        return buffer, memory.rendezvous(buffer, self._name)

    def all_reduce(self, x: Tensor) -> Tensor | None:
        """The sum over ranks of x [T, width], as a new tensor; None, with nothing done, if it goes another way."""
        how = self._way(x)
        if how is None:
            return None
        if how is Way.ONE_SHOT:
            return self._sum(x, None)[0]
        mine = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        mine.copy_(x)
        summed = torch.empty_like(x)
        torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._name, summed)
        return summed

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(rms_norm(s), s) of the stream s = residual + the sum over ranks of x [T, width]; None as `all_reduce`."""
        if self._way(x) is not Way.ONE_SHOT or not residual.is_contiguous() or residual.dtype != x.dtype:
            return None
        return self._sum(x, (residual, weight, eps))

    def _way(self, x: Tensor) -> Way | None:
        rows = self._rows
        if x.dim() != 2 or not 0 < x.shape[0] <= rows.most or x.shape[1] != rows.width or x.dtype != rows.dtype:
            return None
        return way(x.nbytes, x.dtype, self._size)

    def _sum(self, x: Tensor, norm: tuple[Tensor, Tensor, float] | None) -> tuple[Tensor, Tensor]:
        from octavo.kernels.cuda.peer_sum import sum_rows

        told, half = self._addresses, self._rows.most * self._rows.width
        shared = [address + self._told.nbytes for address in told]
        return sum_rows(x, norm, rank=self._rank, shared=shared, told=told, half=half, calls=self._calls)

    def check(self) -> None:
        """Sums once in either way. Raises RuntimeError if it does not add up.

        Afterwards neither a graph nor `abort` has to load a kernel, which would wait for those that run.
        """
        self._answer(torch.zeros_like(self._told), [torch.zeros_like(pad) for pad in self._signals])
        wanted, until = self._size * (self._size + 1) // 2, time.monotonic() + CHECK_SECONDS
        most, width, dtype = self._rows.most, self._rows.width, self._rows.dtype
        for rows in (1, min(most, LARGEST // (width * dtype.itemsize))):
            x = torch.full((rows, width), self._rank + 1, dtype=dtype, device=self._device)
            got = self.all_reduce(x)
            while not torch.cuda.current_stream(self._device).query():
                if time.monotonic() > until:
                    self._release()
                    raise RuntimeError(f"peers' signals do not arrive within {CHECK_SECONDS} s")
                time.sleep(1e-3)
            if got is not None and not bool((got == wanted).all()):
                raise RuntimeError("sums over peers' memory are wrong")

    def abort(self) -> None:
        """Ends kernels that wait for ranks which are no more, in a thread; what they return is meaningless."""
        threading.Thread(target=self._release, daemon=True).start()

    def _release(self) -> None:
        """Says in the others' place that they are there, until the device has nothing left to do."""
        until, main = time.monotonic() + ABORT_SECONDS, torch.cuda.default_stream(self._device)
        while not main.query() and time.monotonic() < until:
            self._answer(self._told, self._signals)

    def _answer(self, told: Tensor, signals: list[Tensor]) -> None:
        """Writes, beside what runs, what the other ranks would."""
        with torch.cuda.stream(self._side):
            told.fill_(torch.iinfo(torch.int64).max)
            for rank in set(range(self._size)) - {self._rank} if signals else ():
                signals[self._rank][:, rank].fill_(1)
                signals[rank][:, self._rank].zero_()
            self._side.synchronize()


def share(store: Any, rank: int, size: int, device: torch.device, rows: Rows) -> PeerMemory | None:
    """Memory for sums of `rows` that `size` ranks map from each other; None, on all, if one cannot.

    All ranks call it together, over a store that all of them see. It waits for the others as long as the store does.
    """
    global _meetings
    if rows.dtype not in DTYPES:
        return None
    said = _exchange(store, "offer", rank, size, msgspec.msgpack.encode(_offer(device)))
    offers = [msgspec.msgpack.decode(offer, type=Offer) for offer in said]
    reason = obstacle(offers)
    if reason is None:
        failure = ""
        try:
            _catch_up(max(offer.meetings for offer in offers), device)
            memory = PeerMemory(store, rank, size, device, rows)
            memory.check()
        except (RuntimeError, AttributeError) as error:  # the latter: of a torch without it
            failure = str(error).strip().partition("\n")[0] or repr(error)
            _meetings = FAILED
        failures = [text.decode() for text in _exchange(store, "shared", rank, size, failure.encode())]
        if not any(failures):
            return memory
        reason = "; ".join(f"rank {i}: {text}" for i, text in enumerate(failures) if text)
    logger.info("ranks sum through NCCL alone, which is slower for small batches: %s", reason)
    return None


def _offer(device: torch.device) -> Offer:
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    machine = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    reach = [i for i in range(torch.cuda.device_count()) if i == device.index or _reaches(device, i)]
    return Offer(machine, device.index, tuple(reach), _meetings, os.environ.get(OVERLAP) == "1")


def _reaches(device: torch.device, other: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(device, other))


def _catch_up(meetings: int, device: torch.device) -> None:
    """Meets nobody until this process has met as often as any of its peers."""
    for _ in range(meetings - _meetings):
        PeerMemory(dist.HashStore(), 0, 1, device, Rows(1, 1, torch.float32))  # type: ignore[attr-defined]


def _exchange(store: Any, what: str, rank: int, size: int, said: bytes) -> list[bytes]:
    """What every rank says, in rank order."""
    store.set(f"{what} {rank}", said)
    return [bytes(store.get(f"{what} {other}")) for other in range(size)]


def _c10d() -> Any:
    """torch has no public name for what makes symmetric memory outside its global process group."""
    return torch._C._distributed_c10d
