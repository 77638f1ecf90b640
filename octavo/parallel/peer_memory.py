"""Sums over memory that the GPUs of one machine map from each other: a third of NCCL's time for a decode step's sums.

The kernels are those of torch's symmetric memory, without NVLink multicast. Both add in rank order and in the tensor's
own type, so every rank gets the same bits, whatever the size. Owns the shared buffer and the decision, which all ranks
take alike, whether there is one; what it declines goes through NCCL (`comm`).

A call waits on the device for the same call of every other rank, eagerly or in a CUDA graph, and has no timeout.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
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
DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes that a thread loads at once; sizes and offsets are multiples of it."""
ONE_SHOT_READ = 1 << 20
"""Bytes read from others up to which one shot is faster. Two H200: 9.5 against 7.7 us at 512 KB and 30.2 against 19.9
at 4 MB, to which two shots add a copy into the buffer."""
LARGEST = 16 << 20
"""Bytes beyond which the link decides, and NCCL keeps more of the GPU busy with it."""
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Variable by which torch, for tests, lets ranks share a GPU."""
CHECK_SECONDS = 10.0
ABORT_SECONDS = 1.0

_meetings = 0
"""How many times this process has shared memory: torch numbers them, and peers meet under the same number. FAILED once
that number is uncertain."""
FAILED = -1


class Way(Enum):
    """How a sum is made."""

    ONE_SHOT = "every rank reads the others' tensors and adds them all"
    TWO_SHOT = "every rank adds its part of all tensors, then reads the other parts"


def way(size: int, dtype: torch.dtype, ranks: int, capacity: int) -> Way | None:
    """How `ranks` ranks sum a tensor of `size` bytes through buffers of `capacity` bytes; None: not through them."""
    if not 0 < size <= capacity or size % ALIGNMENT or dtype not in DTYPES:
        return None
    return Way.ONE_SHOT if (ranks - 1) * size <= ONE_SHOT_READ else Way.TWO_SHOT


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
    """This rank's view of the ranks' buffers of `capacity` bytes. Made by `share`."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, capacity: int) -> None:
        global _meetings
        self._rank, self._size, self._device, self._capacity = rank, size, device, capacity
        self._name = f"octavo-{_meetings}"
        # torch finds the store of a meeting through a registered group, which its registry does not keep alive.
        self._group = _c10d().ProcessGroup(store, rank, size)
        self._group._set_group_name(self._name)
        _c10d()._register_process_group(self._name, self._group)
        memory = _c10d()._SymmetricMemory
        self._buffer: Tensor = memory.empty_strided_p2p((capacity,), (1,), torch.uint8, device)
        self._handle = memory.rendezvous(self._buffer, self._name)
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        _meetings += 1

    def all_reduce(self, x: Tensor) -> Tensor | None:
        """The sum over ranks of contiguous tensors of one shape, as a new tensor; None, with nothing done, as `way`."""
        how = way(x.nbytes, x.dtype, self._size, self._capacity)
        if how is None:
            return None
        if x.storage_offset() * x.itemsize % ALIGNMENT:
            x = x.clone()
        mine = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if how is Way.ONE_SHOT:
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(mine, x, "sum", self._name)
            return summed
        mine.copy_(x)
        summed = torch.empty_like(x)
        torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._name, summed)
        return summed

    def check(self) -> None:
        """Sums once in either way. Raises RuntimeError if it does not add up.

        Afterwards neither a graph nor `abort` has to load a kernel, which would wait for those that run.
        """
        spare = torch.zeros(self._size, self._size, dtype=torch.int32, device=self._device)
        self._answer([spare] * self._size)
        wanted, until = self._size * (self._size + 1) // 2, time.monotonic() + CHECK_SECONDS
        for size in (ALIGNMENT, self._capacity):
            got = self.all_reduce(torch.full((size // 4,), self._rank + 1.0, device=self._device))
            while not torch.cuda.current_stream(self._device).query():
                if time.monotonic() > until:
                    self._release()
                    raise RuntimeError(f"peers' signals do not arrive within {CHECK_SECONDS} s")
                time.sleep(1e-3)
            if got is None or not bool((got == wanted).all()):
                raise RuntimeError("sums over peers' memory are wrong")

    def abort(self) -> None:
        """Ends kernels that wait for ranks which are no more, in a thread; what they return is meaningless."""
        threading.Thread(target=self._release, daemon=True).start()

    def _release(self) -> None:
        """Says in the others' place that they are there, until the device has nothing left to do.

        A signal is a word for each block of a kernel and each rank: its sender sets it, its receiver clears it.
        """
        until, main = time.monotonic() + ABORT_SECONDS, torch.cuda.default_stream(self._device)
        pads = [self._handle.get_signal_pad(rank, dtype=torch.int32) for rank in range(self._size)]
        signals = [pad[: pad.numel() // self._size * self._size].view(-1, self._size) for pad in pads]
        while not main.query() and time.monotonic() < until:
            self._answer(signals)

    def _answer(self, signals: list[Tensor]) -> None:
        """Writes into each rank's signals [blocks, ranks], beside what runs, what the other ranks would."""
        with torch.cuda.stream(self._side):
            for rank in set(range(self._size)) - {self._rank}:
                signals[self._rank][:, rank].fill_(1)
                signals[rank][:, self._rank].zero_()
            self._side.synchronize()


def share(store: Any, rank: int, size: int, device: torch.device, capacity: int) -> PeerMemory | None:
    """Buffers that `size` ranks map from each other, of `capacity` bytes, at most LARGEST; None, on all, if one cannot.

    All ranks call it together, over a store that all of them see. It waits for the others as long as the store does.
    """
    global _meetings
    capacity = min(-(-capacity // 1024) * 1024, LARGEST)
    said = _exchange(store, "offer", rank, size, msgspec.msgpack.encode(_offer(device)))
    offers = [msgspec.msgpack.decode(offer, type=Offer) for offer in said]
    reason = obstacle(offers)
    if reason is None:
        failure = ""
        try:
            _catch_up(max(offer.meetings for offer in offers), device)
            memory = PeerMemory(store, rank, size, device, capacity)
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
        PeerMemory(dist.HashStore(), 0, 1, device, ALIGNMENT)  # type: ignore[attr-defined]


def _exchange(store: Any, what: str, rank: int, size: int, said: bytes) -> list[bytes]:
    """What every rank says, in rank order."""
    store.set(f"{what} {rank}", said)
    return [bytes(store.get(f"{what} {other}")) for other in range(size)]


def _c10d() -> Any:
    """torch has no public name for what makes symmetric memory outside its global process group."""
    return torch._C._distributed_c10d
