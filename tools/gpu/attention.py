"""Times attention on the GPU over candidate launches: `python tools/gpu/attention.py [decode] [prefill] [plans]`.

Decode: bytes of keys and values over time, against 4.6 TB/s, each shape in a CUDA graph of launches that walk through
enough separate rows to leave no reuse in L2. Prefill: 4 * heads * dim operations for every visible pair of tokens,
against 790 TFLOP/s. Plans: what cuDNN spends on a shape it has not seen, and the gather that its way needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from octavo.kernels.cuda.attention_dense import DenseRows
from torch import Tensor

from octavo.kernels.cuda import attention_decode, attention_dense, attention_hopper, attention_prefill
from octavo.kernels.cuda.attention_decode import DecodeConfig
from octavo.kernels.cuda.attention_prefill import PrefillConfig

PAGE = 16
BF16 = torch.bfloat16


def microseconds(launches: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Median time of one of the launches, captured together in one graph."""
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times: list[float] = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times[1:])[replays // 2]


class Cache:
    """`rows` rows of `length` tokens in shuffled pages, `copies` times over, so that copies never share a page."""

    def __init__(
        self, rows: int, length: int, kv_heads: int, dim: int, *, capacity: int = 0, heads_first: bool = False
    ) -> None:
        pages = -(-max(length, capacity) // PAGE)
        size = 2 * rows * length * kv_heads * dim * 2
        self.copies = max(1, min(256, 400_000_000 // size))
        total = self.copies * rows * pages
        shape = (2, total, kv_heads, PAGE, dim) if heads_first else (2, total, PAGE, kv_heads, dim)
        memory = torch.randn(shape, dtype=BF16, device="cuda")
        self.k, self.v = memory.transpose(2, 3) if heads_first else memory
        self.table = torch.randperm(total, device="cuda").to(torch.int32).view(self.copies * rows, pages)
        self.rows = torch.arange(self.copies * rows, device="cuda").view(self.copies, rows)
        self.seq_lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")


def decode_candidates(rows: int, kv_heads: int, group: int, dim: int, length: int) -> Iterator[DecodeConfig]:
    yield attention_decode.config(rows, kv_heads, group, dim, length)
    shapes = [(32, 2, 5), (64, 4, 3), (64, 4, 5), (64, 2, 5), (128, 4, 3)]
    base, most = max(1, 132 * 4 // (rows * kv_heads)), min(64, -(-length // 32))
    splits = sorted(
        {min(most, n) for n in (base, 2 * base, 4 * base)} | ({most // 2, most // 4} if base > most else set())
    )
    for (block_n, warps, stages), count, fused in product(shapes, splits, (False, True)):
        if count > 1 or not fused:
            yield DecodeConfig(block_n, warps, stages, count, fused)


def time_decode(cache: Cache, q: Tensor, launch: DecodeConfig, pdl: bool = False) -> float:
    out = torch.empty_like(q)
    arrivals = torch.zeros(65536, dtype=torch.int32, device="cuda")
    launches = [
        partial(
            attention_decode.decode, q, cache.k, cache.v, cache.table, cache.rows[i % cache.copies], cache.seq_lens,
            out, launch, scale=0.1, arrivals=arrivals, pdl=pdl,
        )
        for i in range(max(cache.copies, 4))
    ]  # fmt: skip
    return microseconds(launches)


def decode_table() -> None:
    print("decode: rows x tokens heads/kv/dim: the chosen launch, the best ones | us TB/s %")
    for heads, kv_heads, dim, rows, length in [
        (32, 8, 128, 256, 1536),
        (32, 8, 128, 32, 1152),
        (32, 8, 128, 8, 1152),
        (32, 8, 128, 8, 8192),
        (32, 8, 128, 32, 16384),
        (32, 8, 128, 1, 384),
        (16, 8, 128, 256, 800),
        (16, 8, 128, 1, 128),
        (16, 8, 128, 1, 640),
        (32, 8, 64, 128, 1152),
    ]:
        cache = Cache(rows, length, kv_heads, dim)
        q = torch.randn(rows, heads, dim, dtype=BF16, device="cuda")
        launches = decode_candidates(rows, kv_heads, heads // kv_heads, dim, length)
        results = [(time_decode(cache, q, launch), _short(launch), launch) for launch in launches]
        best = sorted(results[1:], key=lambda r: r[0])[:3]
        lines = [results[0][:2], *(r[:2] for r in best)]
        lines += [(time_decode(cache, q, r[2], True), r[1] + " +PDL") for r in (results[0], best[0])]
        del cache
        if rows in (256, 32) and dim == 128 and length < 2048:
            cache = Cache(rows, length, kv_heads, dim, heads_first=True)
            lines.append((time_decode(cache, q, best[0][2]), best[0][1] + " [heads, page]"))
            del cache
        # A graph captured for long rows that replays with short ones.
        cache = Cache(rows, length, kv_heads, dim)
        longer = attention_decode.config(rows, kv_heads, heads // kv_heads, dim, 32768)
        lines.append((time_decode(cache, q, longer), _short(longer) + " for 32k"))
        print(f"{rows} x {length} {heads}/{kv_heads}/{dim}")
        size = 2 * rows * length * kv_heads * dim * 2
        for us, name in lines:
            print(f"  {name:42} {us:8.2f} {size / us / 1e6:5.2f} {size / us / 4.6e6:4.0%}")


def _short(launch: DecodeConfig) -> str:
    merged = "fused" if launch.fused else "combine"
    return f"n{launch.block_n} w{launch.num_warps} s{launch.num_stages} splits {launch.splits} {merged}"


def prefill_table() -> None:
    print("prefill: rows x new (+ cached) heads/kv/dim | us TFLOP/s %")
    for shape in [
        (32, 8, 128, 8, 1024, 0),
        (32, 8, 128, 4, 2048, 0),
        (32, 8, 128, 2, 4096, 0),
        (32, 8, 128, 1, 16384, 0),
        (32, 8, 128, 1, 8192, 8192),
        (32, 8, 128, 1, 8161, 8200),
        (32, 8, 64, 2, 4096, 0),
        (16, 8, 128, 16, 550, 0),
    ]:
        heads, kv_heads, dim, rows, new, cached = shape
        operations = 4 * heads * dim * rows * (new * cached + new * (new + 1) / 2)
        print(f"{rows} x {new} + {cached} {heads}/{kv_heads}/{dim}")
        for name, us in prefill_times(*shape):
            rate = operations / us / 1e6
            print(f"  {name:42} {us:9.1f} {rate:6.0f} {rate / 790:4.0%}")


def prefill_times(heads: int, kv_heads: int, dim: int, rows: int, new: int, cached: int) -> Iterator[tuple[str, float]]:
    cache = Cache(rows, new + cached, kv_heads, dim)
    q = torch.randn(rows * new, heads, dim, dtype=BF16, device="cuda")
    out = torch.empty_like(q)
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * new
    news, lens = np.full(rows, new, np.int32), np.full(rows, new + cached, np.int32)
    for launch in [
        PrefillConfig(128, 64, 8, 3),
        PrefillConfig(128, 64, 8, 5),
        PrefillConfig(128, 128, 8, 3),
        PrefillConfig(64, 64, 4, 3),
    ]:
        listed = attention_prefill.tiles(np.arange(rows), news, lens, launch.block_m // (heads // kv_heads))
        run: Callable[[], object] = partial(
            attention_prefill.prefill, q, cache.k, cache.v, cache.table, cache.rows[0], starts, cache.seq_lens,
            torch.from_numpy(listed).cuda(), out, launch, scale=0.1,
        )  # fmt: skip
        yield (
            f"paged m{launch.block_m} n{launch.block_n} w{launch.num_warps} s{launch.num_stages}",
            microseconds([run] * 3),
        )
    if new >= 1024:
        part = DenseRows(0, rows, 0, new, cached)
        for way in ("cudnn", "hopper"):
            run = partial(
                attention_dense.dense,
                q,
                cache.k,
                cache.v,
                cache.table,
                cache.rows[0],
                cache.seq_lens,
                part,
                out,
                0.1,
                way,
            )
            yield f"{way} with gather and all else", microseconds([run] * 3)
    k, v = (torch.randn(rows, new + cached, kv_heads, dim, dtype=BF16, device="cuda") for _ in range(2))
    for block_n, stages in ((128, 2), (64, 3), (64, 4)):
        run = partial(attention_hopper.hopper, q, k, v, out, 0, new, cached, 0.1, block_n=block_n, stages=stages)
        yield f"hopper alone n{block_n} s{stages}", microseconds([run] * 3)
    if not cached:
        run = partial(attention_dense.cudnn, q.view(rows, new, heads, dim), k, v, 0.1, causal=True)
        yield "cuDNN alone", microseconds([run] * 3)


def plan_table() -> None:
    heads, kv_heads, dim = 32, 8, 128
    for causal in (True, False):
        costs = []
        for length in (2560, 3072, 3584, 4608, 5120, 6656, 9216, 12800):
            q = torch.randn(1, length, heads, dim, dtype=BF16, device="cuda")
            k = torch.randn(1, length, kv_heads, dim, dtype=BF16, device="cuda")
            walls = []
            for _ in range(2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                attention_dense.cudnn(q, k, k, 0.1, causal=causal, log_sum=not causal)
                torch.cuda.synchronize()
                walls.append((time.perf_counter() - begin) * 1e3)
            costs.append(walls[0] - walls[1])
        print(f"cuDNN, new shapes, causal={causal}, ms over a known one: " + " ".join(f"{cost:.1f}" for cost in costs))
    for length in (4096, 16384):
        cache = Cache(1, length, kv_heads, dim)
        launches = [
            partial(
                attention_dense.gather, cache.k, cache.v, cache.table, cache.rows[i % cache.copies], cache.seq_lens,
                0, 1, length,
            )
            for i in range(8)
        ]  # fmt: skip
        us = microseconds(launches)
        size = 2 * 2 * length * kv_heads * dim * 2
        print(f"gather of {length} tokens: {us:.1f} us, {size / us / 1e6:.2f} TB/s (read and written)")


def main(sections: list[str]) -> None:
    tables = {"plans": plan_table, "prefill": prefill_table, "decode": decode_table}
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in sections or list(tables):
        begin = time.perf_counter()
        tables[name]()
        print(f"[{name}: {time.perf_counter() - begin:.0f} s]")


if __name__ == "__main__":
    main(sys.argv[1:])
