"""`octavo doctor`: which hardware, versions, kernels and settings an engine would use here, and why.

Imports torch, and with it the kernels, only when it runs; loads no model. Exit code 2 when the model cannot run.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from octavo.config import EngineArgs, detect_device, resolve
from octavo.config.device import count_gpus, detect_cpu, detect_cuda
from octavo.config.flags import parse_given
from octavo.config.resolve import GIB
from octavo.core.errors import OctavoError
from octavo.core.facts import DeviceFacts

PACKAGES = ("octavo", "torch", "triton", "numpy", "msgspec", "pyzmq", "tokenizers", "safetensors", "uvicorn", "uvloop")
Row = tuple[str, str]


def run(namespace: argparse.Namespace) -> int:
    args, _, dropped = parse_given(namespace)
    for line in dropped:
        print(f"octavo: {line}", file=sys.stderr)
    _section("versions", versions())
    _section("hardware", hardware())
    _section("kernels", kernels(args))
    try:
        rows = settings(args)
    except OctavoError as error:
        _section("settings", [(args.model or "default model", f"cannot run: {error}")])
        return 2
    _section("settings", rows)
    return 0


def _section(title: str, rows: Iterator[Row] | list[Row]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:<24}{value}")


def versions() -> Iterator[Row]:
    """The interpreter and the packages that matter, those that are missing included."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def hardware() -> Iterator[Row]:
    """The CPU, and every GPU that CUDA shows."""
    yield "cpu", _describe(detect_cpu())
    count = count_gpus()
    for index in range(count):
        yield f"cuda:{index}", _describe(detect_cuda(index))
    if not count:
        yield "cuda", "no GPU: no CUDA driver, or none that it shows"


def _describe(device: DeviceFacts) -> str:
    memory = f"{device.free_memory / GIB:.1f} of {device.total_memory / GIB:.1f} GiB free"
    cores = f", {device.cores} cores" if device.kind == "cpu" else ""
    return f"{device.name}{cores}, {memory}, {'native' if device.native_bfloat16 else 'no native'} bfloat16"


def kernels(args: EngineArgs) -> Iterator[Row]:
    """What computes on the device of `args`."""
    import torch

    from octavo.kernels import load

    device = detect_device(args.device)
    backend = load(device.kind)
    yield "device", f"{device.kind}: {'as given' if args.device != 'auto' else 'the best that was found'}"
    yield "backend", str(getattr(backend, "__name__", type(backend).__name__))
    yield "torch", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()} instructions"
    if device.kind == "cuda" and not torch.cuda.is_available():
        yield "warning", "this torch has no CUDA: install one that has, or use --device cpu"


def settings(args: EngineArgs) -> list[Row]:
    """What `octavo serve` with these flags decides. Raises OctavoError when it refuses."""
    from octavo.formats import locate, read_facts

    path = locate(args.model, args.revision)
    facts = read_facts(path, args.generation_config)
    _, decisions = resolve(args, facts, detect_device(args.device))
    rows = [("model", f"{path}: {facts.architecture}, {facts.num_layers} layers, hidden {facts.hidden_size}")]
    return rows + [(decision.name, f"{decision.value} ({decision.reason})") for decision in decisions]
