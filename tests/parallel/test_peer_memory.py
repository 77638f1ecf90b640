"""Which sums go over peers' memory, and that ranks agree on having none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from octavo.parallel import peer_memory
from octavo.parallel.peer_memory import FAILED, Offer, Rows, Way, obstacle, share, way

MIB = 1 << 20
BF16 = torch.bfloat16
ROWS = Rows(8, 64, BF16)


@pytest.mark.parametrize(
    ("size", "dtype", "ranks", "expected"),
    [
        (16, BF16, 2, Way.ONE_SHOT),
        (64 * MIB, BF16, 2, Way.ONE_SHOT),
        (MIB // 4, torch.float32, 4, Way.ONE_SHOT),
        (MIB // 2, torch.float32, 4, Way.TWO_SHOT),
        (MIB // 4, BF16, 8, Way.TWO_SHOT),
        (16 * MIB, BF16, 4, Way.TWO_SHOT),
        (16 * MIB + 16, BF16, 4, None),
        (16, torch.float16, 4, Way.ONE_SHOT),
        (MIB, torch.float16, 4, None),
    ],
)
def test_the_way_depends_on_what_a_rank_reads(size: int, dtype: torch.dtype, ranks: int, expected: Way | None) -> None:
    assert way(size, dtype, ranks) is expected


def offers(**changes: Any) -> list[Offer]:
    """Of two ranks that can share; `changes` are the second one's."""
    first: dict[str, Any] = {"machine": "a", "device": 0, "reach": (0, 1), "meetings": 0}
    return [Offer(**first), Offer(**first | {"device": 1} | changes)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"meetings": 3}, None),
        ({"machine": "b"}, "ranks are on several machines"),
        ({"device": 0}, "ranks name their devices [0, 0]"),
        ({"reach": (1,)}, "device 1 cannot map the memory of [0]"),
        ({"meetings": FAILED}, "sharing failed before in one of the processes"),
    ],
)
def test_what_stands_in_the_way_of_sharing(changes: dict[str, Any], reason: str | None) -> None:
    assert obstacle(offers(**changes)) == reason
    assert obstacle(offers(**changes)[::-1]) == reason


def test_ranks_share_a_device_only_if_all_allow_it() -> None:
    apart = offers(device=0, overlap=True)
    assert obstacle(apart) is not None
    assert obstacle([apart[1], apart[1]]) is None


def test_three_ranks_have_no_kernel() -> None:
    assert obstacle([*offers(), Offer("a", 2, (0, 1), 0)]) == "3 ranks, not 2, 4, 8"


class Memory:
    """A PeerMemory that cannot be made on `broken` ranks, or does not add up there."""

    broken: tuple[int, ...] = ()

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, rows: Rows) -> None:
        self.rank, self.rows = rank, rows

    def check(self) -> None:
        if self.rank in self.broken:
            raise RuntimeError("sums are wrong\nand more")


def share_twice(monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...] = ()) -> list[Memory | None]:
    """Two ranks as threads."""
    monkeypatch.setattr(peer_memory, "_meetings", 0)
    monkeypatch.setattr(peer_memory, "PeerMemory", Memory)
    monkeypatch.setattr(Memory, "broken", broken)
    monkeypatch.setattr(peer_memory, "_offer", lambda device: offers()[device.index])
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(share, store, rank, 2, torch.device("cuda", rank), ROWS) for rank in range(2)]
        return [future.result(10) for future in made]  # type: ignore[misc]


def test_ranks_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [memory and (memory.rank, memory.rows) for memory in share_twice(monkeypatch)] == [(0, ROWS), (1, ROWS)]


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_a_rank_that_cannot_share_decides_for_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: tuple[int, ...]
) -> None:
    with caplog.at_level("INFO", "octavo"):
        assert share_twice(monkeypatch, broken) == [None, None]
    said = [record.getMessage() for record in caplog.records]
    assert said == said[:1] * 2
    assert said[0].endswith("; ".join(f"rank {rank}: sums are wrong" for rank in broken))
    assert peer_memory._meetings == FAILED
