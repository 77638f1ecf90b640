"""Checks launches of the Hopper product kernel, then times them against cuBLAS, on the GPU.

    PYTHONPATH=. python tools/gpu/linear_hopper.py --m 64 128 256
    PYTHONPATH=. python tools/gpu/linear_hopper.py --m 8192 --models 8b
    PYTHONPATH=. python tools/gpu/linear_hopper.py --check

Each launch is compiled and compared with torch in a process that is ended if it does not answer. CUDA graphs rotate
over copies of the matrix, so that the L2 cache keeps nothing; above 512 rows they follow each other so long that clocks
settle. Candidates and cuBLAS take turns. Gated products are compared with cuBLAS and silu_mul.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.kernels.cuda.activation import silu_mul
from octavo.kernels.cuda.linear_config import HopperConfig
from octavo.kernels.cuda.linear_hopper import hopper_linear
from octavo.kernels.reference import silu_mul as exact_silu_mul

MODELS: dict[str, dict[str, tuple[int, int, int, bool]]] = {
    "8b": {
        "qkv": (32, 6144, 4096, False),
        "out": (32, 4096, 4096, False),
        "gate_up": (32, 28672, 4096, True),
        "down": (32, 4096, 14336, False),
        "head": (1, 128256, 4096, False),
    },
    "0.6b": {
        "qkv": (28, 4096, 1024, False),
        "out": (28, 1024, 2048, False),
        "gate_up": (28, 6144, 1024, True),
        "down": (28, 1024, 3072, False),
        "head": (1, 151936, 1024, False),
    },
}
"""Name -> (how many a model has, N, K, gated)."""
SHARED_MEMORY = 227 * 1024 - 1024
PATIENCE = 20.0
"""Seconds after which a launch counts as hanging."""
COMPILE, START = 10.0, 60.0
"""Seconds that compiling a launch, and starting a process, may take besides."""
SMALL = 512
"""Rows up to which reading the matrix matters."""

Job = tuple[HopperConfig, bool]
Run = Callable[[], object]


def candidates(m: int, gated: bool) -> list[HopperConfig]:
    """Launches worth measuring for m rows."""
    found: list[HopperConfig] = []
    if m <= 64:
        found += [
            HopperConfig(True, 2, 64, 64, 8),
            HopperConfig(True, 2, 128, 64, 4, 1),
            HopperConfig(True, 1, 64, 64, 12),
            HopperConfig(True, 1, 128, 64, 8, 1),
        ]
    elif m <= 128:
        found += [
            HopperConfig(True, 2, 64, 128, 6),
            HopperConfig(True, 2, 128, 128, 4, 1),
            HopperConfig(True, 1, 64, 128, 8),
            HopperConfig(True, 2, 128, 64, 4, 1),
            HopperConfig(False, 2, 64, 128, 6),
        ]
    elif m <= SMALL:
        found += [
            HopperConfig(True, 2, 64, 256, 4),
            HopperConfig(True, 2, 128, 128, 4, 1),
            HopperConfig(True, 2, 64, 128, 6),
            HopperConfig(False, 2, 64, 256, 4),
            HopperConfig(False, 2, 128, 128, 4, 1),
            HopperConfig(False, 2, 64, 128, 6),
        ]
    else:
        wide, tall = HopperConfig(False, 2, 64, 256, 4), HopperConfig(False, 2, 128, 128, 4, 1)
        found += [replace(wide, band=band) for band in (4, 8, 16, 32)]
        found += [replace(tall, band=band) for band in (4, 8, 16)]
        found += [HopperConfig(True, 2, 64, 256, 4, band=8), HopperConfig(True, 2, 128, 128, 4, 1, band=16)]
    return [config for config in found if config.nbytes(gated) <= SHARED_MEMORY]


def short(config: HopperConfig) -> str:
    side = "W" if config.swapped else "x"
    return f"{side}{config.groups}x{config.rows}x{config.columns} s{config.stages} y{config.buffers} b{config.band}"


def draw(*shape: int) -> Tensor:
    """Small uniform values, as dummy weights have them."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_(-1e-3, 1e-3)


def check(config: HopperConfig, gated: bool) -> str:
    """Empty, or what is wrong. Ragged sizes; few and many tiles; twice, for sums that depend on timing."""
    x_rows, w_rows = config.tile()
    worst = 0.0
    for m, n, k in (
        (max(x_rows - 5, 1), 1072, 1032),
        (2 * x_rows + 3, 70 * w_rows + 16, 520),
        (x_rows, 4096, 4096),
        (2 * x_rows, 48 * w_rows, 2048),
    ):
        x = torch.randn(m, k, device="cuda").bfloat16()
        weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
        expected = F.linear(x.float(), weight.float())
        if gated:
            expected = exact_silu_mul(expected)
        poison = torch.full_like(expected, torch.nan, dtype=torch.bfloat16)
        del poison
        y = hopper_linear(x, weight, gated=gated, config=config)
        torch.cuda.synchronize()
        error = (y.float() - expected).abs()
        worst = max(worst, float(error.norm() / expected.norm()))
        if not bool((error <= 0.01 * expected.abs() + 0.01).all()):
            wrong = (~(error <= 0.01 * expected.abs() + 0.01)).nonzero()
            return f"{m}x{n}x{k}: {len(wrong)} of {y.numel()} wrong, first {wrong[0].tolist()}, norm {worst:.2g}"
        for _ in range(3):
            if not torch.equal(hopper_linear(x, weight, gated=gated, config=config), y):
                return f"{m}x{n}x{k}: other bits the second time"
    return "" if worst < 4e-3 else f"error {worst:.2g}"


def work(jobs: Connection) -> None:
    """Answers jobs until there is none or one raises, after which the device may be out of order."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact_silu_mul(
        F.linear(torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda"))
    ).isnan().any().item()
    jobs.send(("", True))
    while (job := jobs.recv()) is not None:
        try:
            jobs.send((check(*job), True))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            jobs.send((f"{type(error).__name__} {' / '.join(lines[:2] + lines[-2:])[:300]}", False))
            return


@dataclass
class Worker:
    process: Any
    jobs: Connection
    job: Job | None
    since: float


def start() -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours, None, time.monotonic() + START)


def answered(worker: Worker, ready: bool) -> tuple[str, bool] | None:
    """What is wrong with the worker's job, and whether the worker can go on; None while it works."""
    if ready:
        try:
            answer: tuple[str, bool] = worker.jobs.recv()
        except EOFError:
            return "the process died", False
        return answer
    return ("HANGS", False) if time.monotonic() > worker.since + PATIENCE else None


def checked(jobs: Iterable[Job], processes: int) -> set[Job]:
    """The jobs that give right results; the others are printed."""
    began, left = time.monotonic(), list(jobs)
    total, good = len(left), set[Job]()
    workers = [start() for _ in range(min(processes, total))]
    while workers:
        ready = wait([worker.jobs for worker in workers], timeout=1)
        for worker in list(workers):
            answer = answered(worker, worker.jobs in ready)
            if answer is None:
                continue
            wrong, alive = answer
            if worker.job is not None and not wrong:
                good.add(worker.job)
            elif wrong:
                label = "start" if worker.job is None else short(worker.job[0]) + " gated" * worker.job[1]
                print(f"  bad: {label}: {wrong}", flush=True)
            if alive and left:
                worker.job, worker.since = left.pop(0), time.monotonic() + COMPILE
                worker.jobs.send(worker.job)
                continue
            worker.process.kill()
            workers.remove(worker)
            if left and worker.job is not None:
                workers.append(start())
    print(f"{len(good)} of {total} launches are right, {time.monotonic() - began:.0f} s", flush=True)
    return good


class Watchdog:
    """Ends the process when nothing was reported for PATIENCE seconds."""

    def __init__(self) -> None:
        self._doing, self._at = "start", time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def doing(self, what: str) -> None:
        self._doing, self._at = what, time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() < self._at + PATIENCE:
            time.sleep(0.5)
        print(f"HANGS: {self._doing}", flush=True)
        os._exit(1)


def elapsed(run: Run) -> float:
    """Seconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def compare(
    runs: dict[str, Run], least: float, warm: float, rounds: int, dog: Watchdog, label: str
) -> dict[str, float]:
    """Seconds a run, by turns, `least` seconds each after `warm` seconds of the first."""
    repeats = {}
    for name, run in runs.items():
        dog.doing(f"{label} {name}")
        elapsed(run)
        repeats[name] = max(1, int(least / elapsed(run)))
    first = next(iter(repeats))

    def many(run: Run, times: int) -> None:
        for _ in range(times):
            run()

    dog.doing(f"{label} warming")
    elapsed(lambda: many(runs[first], int(warm / least * repeats[first]) + 1))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name, count in repeats.items():
            dog.doing(f"{label} {name}")
            run = runs[name]
            times[name].append(elapsed(lambda run=run, count=count: many(run, count)) / count)  # type: ignore[misc]
    return {name: statistics.median(each) for name, each in times.items()}


def graphed(run: Run) -> Run:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_shape(
    label: str, m: int, n: int, k: int, gated: bool, configs: list[HopperConfig], dog: Watchdog
) -> tuple[float, float]:
    """Prints the candidates, best first; seconds of cuBLAS and of the best."""
    nbytes, operations = 2 * n * k, 2 * m * n * k
    dog.doing(f"{label} weights")
    small = m <= SMALL
    weights = [draw(n, k) for _ in range(max(2, min(64, int(400e6 / nbytes))))]
    x = torch.randn(m, k, device="cuda").bfloat16()

    def plain() -> None:
        for weight in weights:
            y = F.linear(x, weight)
            if gated:
                silu_mul(y)

    def own(config: HopperConfig) -> Run:
        def run() -> None:
            for weight in weights:
                hopper_linear(x, weight, gated=gated, config=config)

        return run

    runs: dict[str, Run] = {"cuBLAS": plain} | {short(config): own(config) for config in configs}
    for name, run in list(runs.items()):
        dog.doing(f"{label} capture {name}")
        try:
            runs[name] = graphed(run)
        except Exception as error:
            print(f"  {label} {name}: {type(error).__name__} {str(error)[:200]}", flush=True)
            del runs[name]
    seconds = compare(runs, *((0.01, 0.1, 5) if small else (0.12, 0.5, 3)), dog, label)
    seconds = {name: value / len(weights) for name, value in seconds.items()}
    base = seconds.pop("cuBLAS")

    def rate(value: float) -> str:
        text = f"{value * 1e6:7.1f} us {operations / value / 1e12:4.0f} TF"
        return text + (f" {nbytes / value / 1e12:4.2f} TB/s" if small else "")

    print(f"{label} M={m} [{n},{k}]{' gated' if gated else ''}: cuBLAS {rate(base)}")
    best = sorted(seconds.items(), key=lambda pair: pair[1])
    for name, value in best[:5] + best[-1:] if len(best) > 5 else best:
        print(f"    {rate(value)} {base / value:5.3f}x {name}", flush=True)
    return base, best[0][1] if best else base


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--m", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["8b"])
    parser.add_argument("--only", nargs="+", help="names of products")
    parser.add_argument("--check", action="store_true", help="only check")
    parser.add_argument("--seconds", type=float, default=130, help="start no shape after this long")
    parser.add_argument("--processes", type=int, default=14, help="that compile and check")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    jobs = {
        (replace(config, band=8), gated): None
        for m, gated in itertools.product(args.m, (False, True))
        for config in candidates(m, gated)
    }
    good = checked(jobs, args.processes)
    if args.check:
        return
    dog = Watchdog()
    with torch.inference_mode():
        for model, m in itertools.product(args.models, args.m):
            base_total = total = best_total = 0.0
            for name, (count, n, k, gated) in MODELS[model].items():
                late = time.monotonic() > deadline
                if (args.only and name not in args.only) or (name == "head" and m > 1024) or late:
                    print(f"{model} {name} M={m}: skipped{', out of time' if late else ''}")
                    continue

                right = [c for c in candidates(m, gated) if (replace(c, band=8), gated) in good]
                base, best = time_shape(f"{model} {name}", m, n, k, gated, right, dog)
                base_total, total = base_total + count * base, total + count * best
                best_total += count * min(base, best)
            print(
                f"== {model} M={m}, all layers: cuBLAS {base_total * 1e6:.0f} us, ours {total * 1e6:.0f},"
                f" better of both {best_total * 1e6:.0f}\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
