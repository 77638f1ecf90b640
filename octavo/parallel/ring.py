"""Frames from one process to several others through shared memory.

A ring of bytes: the writer advances `head`, each reader its own `tail`, all counting bytes from the beginning, and the
writer waits while the slowest reader holds what it would overwrite. A frame is its length and its bytes; frames longer
than the ring pass through it piece by piece.

The memory is anonymous (memfd) and the doorbells are eventfds, so nothing has a name that could be left behind: all of
it ends with the last process that holds it. A reader is told of new bytes by its doorbell alone, never by looking at
`head`: what it then sees is ordered by the kernel, whatever the processor. It asks for a moment without blocking, since
the next frame is often near, and then sleeps.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import time
from collections.abc import Callable

CAPACITY = 4 << 20
SPIN_SECONDS = 50e-6
FULL_SECONDS = 50e-6
"""How often a writer looks whether a full ring has room again."""
_LINE = 64
"""Bytes of a cache line: head, capacity and number of readers in the first, then one for each tail."""
_LENGTH = struct.Struct("<I")


def _never() -> None:
    """The writer's `check` where nothing can go wrong."""


class RingWriter:
    """Makes the ring. `descriptors` of a reader go to its process, which makes a RingReader of them."""

    def __init__(self, readers: int, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._memory = os.memfd_create("octavo-ring", os.MFD_CLOEXEC)
        start = _LINE * (1 + readers)
        os.ftruncate(self._memory, start + capacity)
        self._map = mmap.mmap(self._memory, start + capacity)
        self._counters = memoryview(self._map)[:start].cast("Q")
        self._data = memoryview(self._map)[start:]
        self._counters[1], self._counters[2] = capacity, readers
        self._tails = [_LINE // 8 * (1 + i) for i in range(readers)]
        self._bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(readers)]
        self._head = 0

    def descriptors(self, reader: int) -> tuple[int, int]:
        """(memory, doorbell): file descriptors that the reader's process inherits."""
        return self._memory, self._bells[reader]

    def write(self, frame: bytes, check: Callable[[], None] = _never) -> None:
        """Sends a frame to every reader. While the ring is full, `check` is asked, which may raise."""
        rest = memoryview(_LENGTH.pack(len(frame)) + frame)
        while rest:
            room = self._capacity - (self._head - min(self._counters[tail] for tail in self._tails))
            if not room:
                check()
                time.sleep(FULL_SECONDS)
                continue
            at = self._head % self._capacity
            count = min(room, len(rest), self._capacity - at)
            self._data[at : at + count] = rest[:count]
            rest = rest[count:]
            self._head += count
            self._counters[0] = self._head
            for bell in self._bells:
                os.eventfd_write(bell, 1)

    def close(self) -> None:
        self._counters.release()
        self._data.release()
        self._map.close()
        for descriptor in (self._memory, *self._bells):
            os.close(descriptor)


class RingReader:
    """Reader number `index` of the ring behind the descriptors, which it takes over."""

    def __init__(self, index: int, memory: int, bell: int) -> None:
        self._map = mmap.mmap(memory, os.fstat(memory).st_size)
        os.close(memory)
        header = memoryview(self._map)[:_LINE].cast("Q")
        self._capacity, readers = header[1], header[2]
        start = _LINE * (1 + readers)
        self._counters = memoryview(self._map)[:start].cast("Q")
        self._data = memoryview(self._map)[start:]
        self._at, self._bell = _LINE // 8 * (1 + index), bell
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)
        self._known = self._tail = 0

    def read(self) -> bytes:
        """The next frame; waits for it."""
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return self._take(length)

    def _take(self, size: int) -> bytes:
        taken = bytearray()
        while len(taken) < size:
            if self._known == self._tail:
                self._wait()
                continue
            at = self._tail % self._capacity
            count = min(size - len(taken), self._known - self._tail, self._capacity - at)
            taken += self._data[at : at + count]
            self._tail += count
            self._counters[self._at] = self._tail
        return bytes(taken)

    def _wait(self) -> None:
        """Until the doorbell has rung; bytes may have been taken with an earlier ring."""
        until = time.perf_counter() + SPIN_SECONDS
        while not self._rang():
            if time.perf_counter() > until:
                self._poll.poll()
        self._known = self._counters[0]

    def _rang(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.eventfd_read(self._bell))
        return False
