"""Times the CPU's matrix products at the shapes of the embedded model, beside what the machine can do at all.

python -m benchmarks.cpu_products [--formats fp32,bf16,q4_1] [--tokens 1,8,64] [--threads 1,2] [--shapes qkv,head]

A line is one format, number of tokens and number of threads: GB/s of weights and GFLOP/s (2 operations a weight and
token) of each shape. Every call meets other weights than the one before, of which there are more than caches hold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.bench.roofline import measure_limits
from octavo.kernels import cpu
from octavo.kernels.cpu import quant_linear
from octavo.kernels.cpu.quant_linear import Format, pack

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate+up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
"""[out, in]."""
CACHES = 48 << 20
"""Bytes of weights that are certainly more than the last-level cache."""
SECONDS = 0.12
"""Of one measurement."""
FORMATS = ("fp32", "bf16", "q4_0", "q4_1", "q6_k", "q8_0")
PACKED = {"q4_0": Format.Q4, "q4_1": Format.Q4_MIN, "q6_k": Format.Q6_16, "q8_0": Format.Q8}


@dataclass(frozen=True)
class Product:
    run: Callable[[Tensor], None]
    dtype: torch.dtype
    nbytes: int


def product(name: str, out: int, columns: int) -> Product:
    if name in PACKED:
        return _packed(PACKED[name], out, columns)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    weight = torch.randn(out, columns).to(dtype)
    return Product(lambda x: void(cpu.linear(x, weight, None)), dtype, weight.nbytes)


def _packed(format: Format, out: int, columns: int) -> Product:
    codes = torch.randint(0, 2**format.bits, (out, columns)).to(torch.uint8)
    scales = torch.rand(out, columns // format.group)
    weight = pack(format, codes, scales, scales if format.has_min else None)

    def run(x: Tensor) -> None:
        quant_linear.linear(x, weight, None, torch.empty(x.shape[0], out))

    return Product(run, torch.float32, weight.data.nbytes)


def void(value: object) -> None:
    """Drops a result."""


def seconds(products: list[Product], columns: int, tokens: int) -> float:
    """Median of one call."""
    x = torch.randn(tokens, columns).to(products[0].dtype)
    for one in products[:2]:
        one.run(x)
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(times) < 3:
        one = products[len(times) % len(products)]
        before = time.perf_counter()
        one.run(x)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,8,32,64,128,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    args = parser.parse_args()
    shapes = {name: SHAPES[name] for name in args.shapes.split(",")}
    threads = [int(n) for n in args.threads.split(",")]
    for count in threads:
        torch.set_num_threads(count)
        limits = measure_limits("cpu", "float32")
        print(f"{count} threads: {limits.bandwidth / 1e9:.1f} GB/s read, {limits.flops / 1e9:.1f} GFLOP/s of float32")
    print(f"{'GB/s, GFLOP/s':16s}" + "".join(f"{name:>14s}  " for name in shapes))
    for name in args.formats.split(","):
        made = {}
        for shape, (out, columns) in shapes.items():
            first = product(name, out, columns)
            made[shape] = [first, *(product(name, out, columns) for _ in range(min(CACHES // first.nbytes, 40)))]
        for tokens in map(int, args.tokens.split(",")):
            for count in threads:
                torch.set_num_threads(count)
                cells = []
                for shape, (out, columns) in shapes.items():
                    took = seconds(made[shape], columns, tokens)
                    rate = 2e-9 * tokens * out * columns / took
                    cells.append(f"{made[shape][0].nbytes / took * 1e-9:8.2f}{rate:8.1f}")
                print(f"{name:5s} {tokens:4d} x{count:2d}   " + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
