"""How many threads compute, and which of them are tied to a core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.config.device import available_cores, physical_cpus
from octavo.kernels.cpu import build, threads


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tied() -> list[list[str]]:
    """Processors of this process's threads that may run on one only."""
    found = []
    for status in Path("/proc/self/task").glob("*/status"):
        cpus = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list"))
        if cpus.isdigit():
            found.append([cpus])
    return found


def test_shares_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "physical_cpus", lambda: [3, 5, 8, 9, 12])
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    assert threads.set_up() == 4
    assert torch.get_num_threads() == 4
    assert threads.set_up(1, 2) == 2
    assert threads.set_up(2, 9) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert threads.set_up() == 3
    assert threads.set_up(0, 2) == 2


@pytest.mark.skipif(build.available() is not None or not Path("/proc/self/task").exists(), reason="needs Linux and cc")
@pytest.mark.skipif(len(physical_cpus()) < 2, reason="needs two cores")
def test_only_whole_sets_of_cores_are_tied_and_never_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(physical_cpus())
    own = os.sched_getaffinity(0)
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores - 1))
    threads.set_up()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    before = len(tied())
    threads.set_up()
    assert len(tied()) == before
    monkeypatch.delenv("OMP_PROC_BIND")
    if available_cores() == cores:
        threads.set_up()
        assert len(tied()) == cores - 1
    assert os.sched_getaffinity(0) == own
