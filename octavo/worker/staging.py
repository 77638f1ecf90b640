"""Host memory on its way to the device and back, without waiting.

Owns pinned buffers and the events that say when they are free. On a CPU uploads are views, and downloads copies,
since the next step overwrites what they are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEPTH = 8
"""Uploads that may be on their way at once: a step has one or two, and few are launched ahead."""
_ALIGN = 16
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class Uploader:
    """Copies arrays to the device: all arrays of a call in one transfer from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * DEPTH
        self._free: list[Any] = [None] * DEPTH
        self._turn = 0

    def __call__(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Device tensors of the same dtypes (int32, int64) and shapes."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        *starts, size = accumulate((_padded(array.nbytes) for array in arrays), initial=0)
        pinned = self._pinned(size)
        host = pinned.numpy()
        for array, start in zip(arrays, starts, strict=True):
            host[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        device = pinned.to(self._device, non_blocking=True)
        self._free[self._turn].record()
        whole = {array.dtype: device.view(_DTYPES[array.dtype]) for array in arrays}
        found = []
        for array, start in zip(arrays, starts, strict=True):
            first = start // array.itemsize
            flat = whole[array.dtype][first : first + array.size]
            found.append(flat if array.ndim == 1 else flat.view(array.shape))
        return found

    def _pinned(self, size: int) -> Tensor:
        """A buffer that no transfer reads any more."""
        self._turn = turn = (self._turn + 1) % DEPTH
        if self._free[turn] is None:
            self._free[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            self._free[turn].synchronize()
        if self._buffers[turn].numel() < size:
            self._buffers[turn] = torch.empty(max(2 * size, 1 << 16), dtype=torch.uint8, pin_memory=True)
        return self._buffers[turn][:size]


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Span:
    """Events of one step: its begin and end, and the end of the step before; None on a CPU."""

    begin: Any
    end: Any
    before: Any

    def seconds(self) -> tuple[float, float]:
        """(busy, idle before) of a step that has ended on the device; zeros on a CPU."""
        if self.begin is None:
            return 0.0, 0.0
        idle = 0.0 if self.before is None else self.before.elapsed_time(self.begin)
        return self.begin.elapsed_time(self.end) / 1000, max(idle, 0.0) / 1000


class StepClock:
    """When steps begin and end on the device, kept for `kept` steps: events are used in turn."""

    def __init__(self, device: torch.device, kept: int) -> None:
        self._begins: list[Any] = _events(device, kept) or [None]
        self._turn = 0
        self._before: Any = None

    def begin(self) -> None:
        self._turn = (self._turn + 1) % len(self._begins)
        if self._begins[self._turn] is not None:
            self._begins[self._turn].record()

    def end(self, event: Any) -> Span:
        """The step ended with `event`, which keeps the time as well."""
        span = Span(self._begins[self._turn], event, self._before)
        self._before = event
        return span


def _events(device: torch.device, count: int) -> list[Any]:
    """Events that keep the time; none on a CPU."""
    if device.type == "cpu":
        return []
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Download:
    """Tensors on their way to the host; `wait` returns them there, valid for as many downloads as are kept."""

    host: list[Tensor]
    event: Any

    def wait(self) -> list[Tensor]:
        if self.event is not None:
            self.event.synchronize()
        return self.host


class Downloader:
    """Copies tensors to the host without waiting, into `kept` pinned buffers that are used in turn."""

    def __init__(self, device: torch.device, kept: int) -> None:
        self._device, self._kept = device, kept
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * kept
        self._events = _events(device, kept)
        self._turn = 0

    def __call__(self, tensors: Sequence[Tensor]) -> Download:
        if self._device.type == "cpu":
            return Download([tensor.clone() for tensor in tensors], None)
        self._turn = turn = (self._turn + 1) % self._kept
        sizes = [_padded(tensor.nbytes) for tensor in tensors]
        if self._buffers[turn].numel() < sum(sizes):
            self._buffers[turn] = torch.empty(max(2 * sum(sizes), 1 << 16), dtype=torch.uint8, pin_memory=True)
        host, start = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            place = self._buffers[turn][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            host.append(place.copy_(tensor, non_blocking=True))
            start += size
        self._events[turn].record()
        return Download(host, self._events[turn])
