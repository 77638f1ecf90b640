"""The ring: every reader gets every frame, whole and in order, however long, and nothing is left when it is gone."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.plan import Masks, Plan, decode_plan, encode_plan
from octavo.parallel.ring import RingReader, RingWriter
from octavo.worker.frames import Order, Sample, decode_frame, encode_frame


def readers_of(ring: RingWriter, count: int) -> list[RingReader]:
    """As other processes make them, of descriptors of their own."""
    return [RingReader(i, *map(os.dup, ring.descriptors(i))) for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(1, 3), st.sampled_from([1, 7, 64, 4096]))
def test_readers_get_every_frame_in_order(frames: list[bytes], count: int, capacity: int) -> None:
    ring = RingWriter(count, capacity)
    readers = readers_of(ring, count)
    got: list[list[bytes]] = [[] for _ in readers]

    def read(index: int) -> None:
        got[index] += [readers[index].read() for _ in frames]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for frame in frames:
        ring.write(frame)
    for thread in threads:
        thread.join()
    assert got == [frames] * count
    ring.close()


def test_a_reader_may_lag_by_all_that_fits() -> None:
    ring = RingWriter(1, 100)
    (reader,) = readers_of(ring, 1)
    for i in range(4):
        ring.write(bytes([i]) * 21)
    assert [reader.read()[0] for _ in range(4)] == [0, 1, 2, 3]


def test_a_writer_of_a_full_ring_asks_whether_to_go_on() -> None:
    ring = RingWriter(2, 16)
    fast, _ = readers_of(ring, 2)
    ring.write(b"x" * 12)
    assert fast.read() == b"x" * 12  # the other one has not read

    def gone() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        ring.write(b"y", gone)


def test_nothing_is_left() -> None:
    before, shared = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    ring = RingWriter(3)
    assert set(os.listdir("/dev/shm")) == shared
    ring.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_steady_decode_of_256_rows_through_the_ring() -> None:
    """All rows in one block's phase: every 16th step they all need a new one. Sizes of real plans: tests/core."""
    nothing = np.zeros(0, np.int32)
    rows = np.random.default_rng(0).permutation(256).astype(np.int32)
    ring = RingWriter(1)
    (reader,) = readers_of(ring, 1)
    sizes = []
    for step in range(64):
        blocks = [(int(row), 0, 20, [4000 + int(row)]) for row in rows] if step % 16 == 0 else []
        plan = Plan(step, [], [], [], blocks, rows, 256, 0, 256, nothing, nothing)
        for frame in (plan, Sample(None)):
            ring.write(encode_frame(frame))
        data = reader.read()
        sizes.append(len(data) + len(reader.read()))
        assert encode_plan(decode_plan(data[1:])) == encode_plan(plan)
    assert sum(sizes) / len(sizes) < 1024
    assert max(sizes) < 4096


def test_frames_survive() -> None:
    masks = Masks(np.array([1, 4], np.int32), np.array([[-1, 7, 0], [2**31 - 1, -(2**31), 5]], np.int32))
    again = decode_frame(encode_frame(Sample(masks)))
    assert isinstance(again, Sample)
    assert again.masks is not None
    assert np.array_equal(again.masks.lines, masks.lines)
    assert np.array_equal(again.masks.bits, masks.bits)
    assert again.masks.bits.flags.writeable  # torch takes no other
    for frame in (Sample(None), Order.WARM_UP, Order.LEAVE):
        assert decode_frame(encode_frame(frame)) == frame
