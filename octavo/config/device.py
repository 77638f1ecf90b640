"""What the machine has, found without torch: memory that this process may take, cores, number formats.

Owns the reading of /proc, cgroups, libcuda and NVML. Decides nothing (`resolve.py` does) and creates no CUDA
context, so the front end and `--help` stay light and the GPU's memory stays free.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path

from octavo.core.errors import ConfigError
from octavo.core.facts import DeviceFacts

# Flags of /proc/cpuinfo that mean bfloat16 products in hardware: x86 "flags", Arm "Features".
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# A cgroup v1 without a limit reports a number close to 2^63.
NO_LIMIT = 1 << 60


def detect_device(device: str = "auto") -> DeviceFacts:
    """Facts about `device`: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises ConfigError when the GPU asked for is not there.
    """
    if device == "cpu":
        return detect_cpu()
    if device == "auto":
        return detect_cuda(0) if count_gpus() else detect_cpu()
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if match is None:
        raise ConfigError(f"--device is {device!r}: choose auto, cpu, cuda or cuda:N")
    index, count = int(match[1] or 0), count_gpus()
    if index >= count:
        raise ConfigError(f"--device is {device!r}, but {count or 'no'} GPU(s) can be seen here: try --device cpu")
    return detect_cuda(index)


def detect_cpu(root: Path = Path("/")) -> DeviceFacts:
    """The CPU as this process may use it; `root` is where proc and sys lie."""
    total, available = _memory(root)
    for limit, used in _cgroup_memory(root):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    name, flags = _cpuinfo(root)
    return DeviceFacts(
        kind="cpu",
        name=name,
        total_memory=total,
        free_memory=available,
        native_bfloat16=bool(BFLOAT16_FLAGS & flags),
        cores=available_cores(root),
    )


def _memory(root: Path) -> tuple[int, int]:
    """Bytes of memory, and of what can be had without swapping."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2
    amounts = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    return amounts["MemTotal"], amounts.get("MemAvailable", amounts["MemFree"])


def _cgroup_files(root: Path, controller: str) -> list[tuple[Path, bool]]:
    """Folders of this process's cgroup and of its ancestors for `controller`, with True for version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[tuple[Path, bool]] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if unified else controller)
        own = top / path.lstrip("/")
        # In a container the path may be the host's; the mount then has the container's own group at its top.
        chain = [own, *own.parents][: len(own.relative_to(top).parts) + 1]
        folders += [(folder, unified) for folder in chain if folder.is_dir()]
    return folders


def _number(path: Path, field: int = 0) -> int | None:
    """The file's `field`-th word as a number; None where there is none ("max", or no such file)."""
    try:
        return int(path.read_text().split()[field])
    except (OSError, ValueError, IndexError):
        return None


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every cgroup with a limit that this process is in."""
    limits: list[tuple[int, int]] = []
    for folder, unified in _cgroup_files(root, "memory"):
        limit = _number(folder / ("memory.max" if unified else "memory.limit_in_bytes"))
        if limit is None or limit >= NO_LIMIT:
            continue
        used = _number(folder / ("memory.current" if unified else "memory.usage_in_bytes")) or 0
        limits.append((limit, max(used - _reclaimable(folder), 0)))
    return limits


def _reclaimable(folder: Path) -> int:
    """Bytes of page cache in a cgroup that the kernel gives back under pressure."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    amounts = dict(line.split()[:2] for line in lines if line.strip())
    return int(amounts.get("total_inactive_file", amounts.get("inactive_file", "0")))


def physical_cpus(root: Path = Path("/")) -> list[int]:
    """Processors that this process may run on, the first of each physical core."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            cores.setdefault(path.read_text().strip(), cpu)
        except OSError:
            cores[f"unknown {cpu}"] = cpu
    return list(cores.values())


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores by affinity, or fewer by CPU quota."""
    cores = len(physical_cpus(root))
    for folder, unified in _cgroup_files(root, "cpu"):
        if unified:
            quota, period = _number(folder / "cpu.max"), _number(folder / "cpu.max", 1)
        else:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            cores = min(cores, max(1, -(-quota // period)))
    return cores


def _cpuinfo(root: Path) -> tuple[str, frozenset[str]]:
    """The processor's name and its feature flags, of the first processor listed."""
    name, flags = "", frozenset[str]()
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key == "model name" and not name:
            name = value.strip()
        elif key in ("flags", "features") and not flags:
            flags = frozenset(value.split())
    return name or platform.processor() or platform.machine() or "CPU", flags


class _Library:
    """A C library whose functions return 0 for success."""

    def __init__(self, *names: str) -> None:
        for name in names:
            try:
                self._library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise OSError(f"no {names[0]}")

    def call(self, function: str, *args: object) -> None:
        """Raises OSError with the function's name and its error code."""
        code = getattr(self._library, function)(*args)
        if code != 0:
            raise OSError(code, function)


def _libcuda() -> _Library:
    library = _Library("libcuda.so.1", "libcuda.so")
    library.call("cuInit", 0)
    return library


def count_gpus() -> int:
    """GPUs that CUDA shows this process (CUDA_VISIBLE_DEVICES applies); 0 without a driver."""
    count = ctypes.c_int(0)
    try:
        _libcuda().call("cuDeviceGetCount", ctypes.byref(count))
    except OSError:
        return 0
    return count.value


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def detect_cuda(index: int) -> DeviceFacts:
    """GPU number `index` in CUDA's order. Raises ConfigError when the driver cannot describe it."""
    try:
        cuda = _libcuda()
        handle, major, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name, bus = ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
        cuda.call("cuDeviceGet", ctypes.byref(handle), index)
        cuda.call("cuDeviceGetName", name, len(name), handle)
        cuda.call("cuDeviceTotalMem_v2", ctypes.byref(total), handle)
        cuda.call("cuDeviceGetAttribute", ctypes.byref(major), 75, handle)  # COMPUTE_CAPABILITY_MAJOR
        cuda.call("cuDeviceGetPCIBusId", bus, len(bus), handle)
    except OSError as error:
        raise ConfigError(f"GPU {index} cannot be used: {error}; try --device cpu") from None
    return DeviceFacts(
        kind="cuda",
        name=name.value.decode(),
        total_memory=total.value,
        free_memory=min(_nvml_free(bus.value, total.value), total.value),
        native_bfloat16=major.value >= 8,
        cores=available_cores(),
        index=index,
        count=count_gpus() - index,
    )


def _nvml_free(bus: bytes, default: int) -> int:
    """Free bytes of the GPU at PCI address `bus`; `default` where NVML cannot say."""
    memory, handle = _NvmlMemory(), ctypes.c_void_p()
    try:
        nvml = _Library("libnvidia-ml.so.1", "libnvidia-ml.so")
        nvml.call("nvmlInit_v2")
        try:
            nvml.call("nvmlDeviceGetHandleByPciBusId_v2", bus, ctypes.byref(handle))
            nvml.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        finally:
            nvml.call("nvmlShutdown")
    except OSError:
        return default
    return int(memory.free)
