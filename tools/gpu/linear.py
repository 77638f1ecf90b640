"""Times the matrix products of a model's step, and candidate launches of each product, on the GPU.

    PYTHONPATH=. python tools/gpu/linear.py chain     whole models: cuBLAS against ours, by number of rows
    PYTHONPATH=. python tools/gpu/linear.py trigger   whole models: when a kernel lets the next one start
    PYTHONPATH=. python tools/gpu/linear.py tune      every product alone: candidates of `linear_config`, best first

Chains are CUDA graphs in which every layer has weights of its own. Products alone rotate over enough copies of the
matrix to leave nothing in the L2 cache, one graph of many launches, with dependent launch. What `tune` prints under
"enter in TUNED" is text for `octavo/kernels/cuda/linear_config.py`. A pool of processes compiles beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.kernels.cuda.activation import silu_mul
from octavo.kernels.cuda.launch import without_pdl
from octavo.kernels.cuda.linear import Norm, linear, norm_linear, product
from octavo.kernels.cuda.linear_config import MATVEC_ROWS, Config, Trigger, config, rows_class
from octavo.kernels.cuda.norm import add_rms_norm

Job = TypeVar("Job")
PEAK = 4.6e12
EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """The products of a decoder layer and the head, [out, in] each."""

    name: str
    layers: int
    hidden: int
    q: int
    kv: int
    mlp: int
    vocab: int

    def layer(self) -> dict[str, tuple[int, int]]:
        return {
            "qkv": (self.q + 2 * self.kv, self.hidden),
            "out": (self.hidden, self.q),
            "gate_up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }

    def nbytes(self) -> int:
        return 2 * (self.layers * sum(n * k for n, k in self.layer().values()) + self.vocab * self.hidden)


SHAPES = {
    "8b": Shape("Llama-3.1-8B", 32, 4096, 4096, 1024, 14336, 128256),
    "0.6b": Shape("Qwen3-0.6B", 28, 1024, 2048, 1024, 3072, 151936),
    "1b": Shape("Llama-3.2-1B", 16, 2048, 2048, 512, 8192, 128256),
}


class Chain:
    """A model's step without attention: its first q columns of the qkv product stand for attention's output."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.layers = [{name: draw(n, k) for name, (n, k) in shape.layer().items()} for _ in range(shape.layers)]
        self.head = draw(shape.vocab, shape.hidden)
        self.gain = draw(shape.hidden)

    def products(self, x: Tensor, by: Callable[[Tensor, Tensor, None], Tensor]) -> None:
        """Products only; each reads what the one before wrote, cut or viewed to size without a kernel."""
        for weights in self.layers:
            for name in ("qkv", "out", "gate_up", "down"):
                x = by(_fit(x, weights[name].shape[1]), weights[name], None)
        by(x, self.head, None)

    def composed(self, x: Tensor, by: Callable[[Tensor, Tensor, None], Tensor]) -> None:
        """With norms and SwiGLU as kernels of their own."""
        stream = x
        for weights in self.layers:
            h, stream = add_rms_norm(x, stream, self.gain, EPS)
            x = by(_fit(by(h, weights["qkv"], None), self.shape.q), weights["out"], None)
            h, stream = add_rms_norm(x, stream, self.gain, EPS)
            x = by(silu_mul(by(h, weights["gate_up"], None)), weights["down"], None)
        by(x, self.head, None)

    def fused(self, x: Tensor) -> None:
        stream = x
        for weights in self.layers:
            qkv, stream = norm_linear(x, stream, self.gain, EPS, weights["qkv"], None)
            x = linear(_fit(qkv, self.shape.q), weights["out"], None)
            h, stream = norm_linear(x, stream, self.gain, EPS, weights["gate_up"], None, gated=True)
            x = linear(h, weights["down"], None)
        linear(x, self.head, None)


def _fit(x: Tensor, size: int) -> Tensor:
    """[T, any] -> contiguous [T, size] over the same memory (values do not matter for time)."""
    assert x.shape[1] >= size
    return x.as_strided((x.shape[0], size), (size, 1))


def draw(*shape: int) -> Tensor:
    """Small uniform values, as dummy weights have them."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_(-1e-3, 1e-3)


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The median time of a CUDA graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    del graph
    return sorted(times[2:])[repeats // 2]


def chains(names: Iterable[str], rows: Iterable[int]) -> None:
    for name in names:
        shape = SHAPES[name]
        floor = shape.nbytes() / PEAK * 1e3
        print(f"\n{shape.name}: ms a step; {shape.nbytes() / 1e9:.2f} GB of weights, {floor:.3f} ms at 4.6 TB/s")
        print(
            "rows | products: cuBLAS  ours  ours+PDL  TB/s | with norms, SwiGLU: cuBLAS  composed+PDL  fused  fused+PDL"
        )
        with torch.inference_mode():
            chain = Chain(shape)
            for m in rows:
                _chain_row(chain, m)
            del chain
        torch.cuda.empty_cache()


def _chain_row(chain: Chain, m: int) -> None:
    x = draw(m, chain.shape.hidden)

    def timed(run: Callable[[], None], dependent: bool = True) -> float:
        with nullcontext() if dependent else without_pdl():
            return milliseconds(run)

    cublas = timed(lambda: chain.products(x, F.linear))
    plain = timed(lambda: chain.products(x, linear), False)
    pdl = timed(lambda: chain.products(x, linear))
    cublas_all = timed(lambda: chain.composed(x, F.linear))
    composed = timed(lambda: chain.composed(x, linear))
    fused, fused_pdl = (timed(lambda: chain.fused(x), dependent) for dependent in (False, True))
    rate = chain.shape.nbytes() / pdl / 1e9
    print(
        f"{m:4} | {cublas:16.3f} {plain:6.3f} {pdl:8.3f} {rate:6.2f} |"
        f" {cublas_all:26.3f} {composed:13.3f} {fused:6.3f} {fused_pdl:10.3f}",
        flush=True,
    )


TRIGGERS: tuple[Trigger, ...] = (0, 1, 2)


@contextmanager
def trigger(when: Trigger) -> Iterator[None]:
    """Every launch of ours with this trigger."""

    def changed(m: int, n: int, k: int, gated: bool = False) -> Config | None:
        chosen = config(m, n, k, gated)
        return None if chosen is None else replace(chosen, trigger=when)

    module = vars(sys.modules[product.__module__])
    module["config"] = changed
    try:
        yield
    finally:
        module["config"] = config


def triggers(names: Iterable[str], rows: Iterable[int]) -> None:
    print("\nfused chain with dependent launch, ms: next kernel may start at once, when the input is there, at the end")
    with torch.inference_mode():
        for name in names:
            chain = Chain(SHAPES[name])
            for m in rows:
                times = []
                for when in TRIGGERS:
                    with trigger(when):
                        times.append(milliseconds(partial(chain.fused, draw(m, chain.shape.hidden))))
                print(f"{name:5} rows {m:3}:", *(f"{t:7.3f}" for t in times), flush=True)
            del chain
            torch.cuda.empty_cache()


def candidates(m: int, n: int, k: int) -> list[Config]:
    """Launches worth measuring for m rows and an [n, k] matrix, at most about forty."""
    rows = rows_class(m)
    found = []
    if rows <= MATVEC_ROWS:
        for block_n, block_k, warps, stages in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (1, 2, 4)):
            each = block_k // (32 * warps)
            fits = block_k <= max(k, 512) and stages <= -(-k // block_k) and each in (8, 16)
            if fits and rows * block_n * each <= 64 and (block_n > 1 or n <= 4096):
                found.append(Config(rows, block_n, block_k, warps, stages))
    if rows > 1:
        tile = max(rows, 16)
        for block_n, (block_k, stages), split in itertools.product(
            (16, 32, 64, 128), ((64, 5), (128, 4), (256, 3), (512, 3)), (1, 2, 4, 8)
        ):
            programs, buffers = -(-n // block_n) * split, (block_n + tile) * block_k * 2 * stages
            groups = 4 if block_n <= 32 else 1
            if buffers > 200_000 or block_k // groups < 32 or k < 2 * split * block_k or not 1 <= programs / 66 <= 64:
                continue
            if split > 1 and programs > 132 * 8:
                continue
            found.append(Config(tile, block_n, block_k, 4, stages, split, groups))
    return _thin(found, 40)


def _thin(found: list[Config], most: int) -> list[Config]:
    step = -(-len(found) // most)
    return found[::step] if step > 1 else found


@dataclass(frozen=True)
class Use:
    """How a model uses a product: behind the norm of its stream, before SwiGLU, or bare."""

    normed: bool = False
    gated: bool = False


USES = {"qkv": Use(normed=True), "gate_up": Use(normed=True, gated=True)}


def multiply(x: Tensor, residual: Tensor, gain: Tensor, weight: Tensor, given: Config | None, use: Use) -> None:
    """One product by the given launch (None: cuBLAS), with kernels of their own for what it does not do itself."""
    if use.normed and given is not None and given.rows <= MATVEC_ROWS:
        product(x, weight, None, given, norm=Norm(residual, gain, EPS), gated=use.gated)
        return
    h = add_rms_norm(x, residual, gain, EPS)[0] if use.normed else x
    if given is not None:
        product(h, weight, None, given, gated=use.gated)
        return
    y = F.linear(h, weight)
    if use.gated:
        silu_mul(y)


def time_product(m: int, weights: list[Tensor], given: Config | None, use: Use) -> float:
    """Seconds a product, norm and SwiGLU included."""
    k = weights[0].shape[1]
    x, residual, gain = draw(m, k), draw(m, k), draw(k)

    def run() -> None:
        for weight in weights:
            multiply(x, residual, gain, weight, given, use)

    return milliseconds(run, 5) / len(weights) / 1e3


def tune(names: Iterable[str], rows: Iterable[int], deadline: float) -> None:
    entries = []
    done: set[tuple[int, int, int]] = set()
    print("\nproduct (qkv with norm, gate_up with norm and SwiGLU): us and TB/s of cuBLAS, present choice, best three")
    for name in names:
        shape = SHAPES[name]
        for label, (n, k) in [*shape.layer().items(), ("head", (shape.vocab, shape.hidden))]:
            nbytes = 2 * n * k
            weights = [draw(n, k) for _ in range(max(3, min(64, int(400e6 / nbytes))))]
            for m in rows:
                if (m, n, k) in done or time.monotonic() > deadline:
                    continue
                done.add((m, n, k))
                best = _tune_product(f"{name} {label} {n}x{k} rows {m}", m, weights, USES.get(label, Use()))
                if best is not None:
                    entries.append(best)
            del weights
    print("\nenter in TUNED (more than 3% better than the present choice):")
    print("\n".join(entries))
    if time.monotonic() > deadline:
        print("out of time: run again with fewer --models or --rows")


def _tune_product(label: str, m: int, weights: list[Tensor], use: Use) -> str | None:
    n, k = weights[0].shape

    def rate(seconds: float) -> str:
        return f"{seconds * 1e6:6.1f} {2 * n * k / seconds / 1e12:4.2f}"

    with torch.inference_mode():
        cublas = time_product(m, weights, None, use)
        chosen = config(m, n, k)
        present = cublas if chosen is None else time_product(m, weights, chosen, use)
        timed = []
        for given in candidates(m, n, k):
            try:
                timed.append((time_product(m, weights, given, use), given))
            except Exception as error:
                print("   ", short(given), type(error).__name__, str(error)[:60])
    timed.sort(key=lambda pair: pair[0])
    print(
        f"{label}: cuBLAS {rate(cublas)} | now {rate(present)} |",
        " | ".join(f"{rate(t)} {short(c)}" for t, c in timed[:3]),
        flush=True,
    )
    best, winner = timed[0] if timed and timed[0][0] < cublas else (cublas, None)
    return f"    ({rows_class(m)}, {n}, {k}): {short(winner)}," if best < 0.97 * present else None


def short(given: Config | None) -> str:
    if given is None:
        return "None"
    values = [given.rows, given.block_n, given.block_k, given.warps, given.stages, given.split, given.groups]
    while len(values) > 5 and values[-1] == 1:
        values.pop()
    return f"Config({', '.join(map(str, values))})"


def build_product(job: tuple[int, int, int, Config, Use]) -> None:
    """Compiles one launch into Triton's cache on disk by running it."""
    m, n, k, given, use = job
    try:
        multiply(draw(m, k), draw(m, k), draw(k), draw(min(n, 4096), k), given, use)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{short(given)} for {m} rows, {n} x {k}: {type(error).__name__} {str(error)[:80]}", flush=True)


def build_chain(job: tuple[str, int, bool, Trigger | None]) -> None:
    """Compiles a chain's launches by running one layer."""
    name, m, dependent, when = job
    with torch.inference_mode(), nullcontext() if dependent else without_pdl():
        chain = Chain(replace(SHAPES[name], layers=1))
        x = draw(m, chain.shape.hidden)
        with nullcontext() if when is None else trigger(when):
            chain.fused(x)
        if when is None:
            chain.composed(x, linear)
            chain.products(x, linear)
        torch.cuda.synchronize()


def build(one: Callable[[Job], None], jobs: Iterable[Job], processes: int) -> None:
    jobs = list(jobs)
    start = time.monotonic()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(one, jobs))
    print(f"{len(jobs)} compile jobs in {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=("chain", "trigger", "tune"))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8b", "0.6b"])
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=110, help="stop tuning after this long")
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if args.what == "chain":
        rows = args.rows or ROWS
        build(build_chain, itertools.product(args.models, rows, (False, True), (None,)), args.processes)
        chains(args.models, rows)
    elif args.what == "trigger":
        rows = args.rows or (1, 4, 16, 64)
        build(build_chain, itertools.product(args.models, rows, (True,), TRIGGERS), args.processes)
        triggers(args.models, rows)
    else:
        rows = args.rows or (1, 4, 16, 64)
        jobs = {}
        for name, m in itertools.product(args.models, rows):
            shape = SHAPES[name]
            for label, (n, k) in [*shape.layer().items(), ("head", (shape.vocab, shape.hidden))]:
                use = USES.get(label, Use())
                jobs.update({(k, given, use): (m, n, k, given, use) for given in candidates(m, n, k)})
        build(build_product, jobs.values(), args.processes)
        tune(args.models, rows, deadline)


if __name__ == "__main__":
    main()
