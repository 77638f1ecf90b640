"""What the machine has, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.config import device
from octavo.config.device import detect_cpu, detect_device
from octavo.core.errors import ConfigError

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 16 GiB of memory, 12 of them available, and 64 cores on offer."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {12 << 20} kB\n")
    write(tmp_path / "proc/cpuinfo", "processor : 0\nmodel name : Chip 9\nflags : fpu avx2 avx512_bf16\n")
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    return tmp_path


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_limits(root: Path) -> None:
    found = detect_cpu(root)
    assert (found.kind, found.name, found.cores) == ("cpu", "Chip 9", 64)
    assert (found.total_memory, found.free_memory) == (16 * GIB, 12 * GIB)
    assert found.native_bfloat16


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("flags : fpu amx_bf16", True),
        ("Features : asimd bf16", True),
        ("flags : fpu avx512f", False),
        ("flags : fpu avx512_bf16x", False),
    ],
)
def test_native_bfloat16(root: Path, line: str, native: bool) -> None:
    write(root / "proc/cpuinfo", f"model name : x\n{line}\n")
    assert detect_cpu(root).native_bfloat16 is native


def test_cgroup_2_of_the_process_and_above_it(root: Path) -> None:
    write(root / "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(root / "sys/fs/cgroup/a/memory.max", str(4 * GIB))
    write(root / "sys/fs/cgroup/a/memory.current", str(3 * GIB))
    write(root / "sys/fs/cgroup/a/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    write(root / "sys/fs/cgroup/a/b/cpu.max", "250000 100000\n")
    found = detect_cpu(root)
    assert (found.total_memory, found.free_memory) == (4 * GIB, 2 * GIB)
    assert found.cores == 3


def test_cgroup_1_and_its_number_for_no_limit(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    write(root / "sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(2 * GIB))
    write(root / "sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(3 * GIB))
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    write(root / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "150000")
    write(root / "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000")
    found = detect_cpu(root)
    assert (found.total_memory, found.free_memory) == (2 * GIB, 0)
    assert found.cores == 2


def test_a_quota_of_less_than_a_core_is_one(root: Path) -> None:
    write(root / "sys/fs/cgroup/a/b/cpu.max", "10000 100000\n")
    assert detect_cpu(root).cores == 1


def test_processors_of_one_core_count_once(root: Path) -> None:
    for cpu in range(64):
        write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 32},{cpu % 32 + 32}\n")
    assert detect_cpu(root).cores == 32
    assert device.physical_cpus(root) == list(range(32))


def test_only_processors_of_the_affinity_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        write(
            root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n",
        )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5, 7}, raising=False)
    assert device.physical_cpus(root) == [1, 4, 7]


def test_without_proc_there_is_still_an_answer(tmp_path: Path) -> None:
    found = detect_cpu(tmp_path)
    assert found.name
    assert found.total_memory > found.free_memory > 0


@pytest.mark.parametrize(("gpus", "asked"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (1, "vulkan")])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: gpus)
    with pytest.raises(ConfigError, match=f"--device is '{asked}'"):
        detect_device(asked)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    assert detect_device("auto").kind == detect_device("cpu").kind == "cpu"
