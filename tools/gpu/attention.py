"""Times attention on the GPU over candidate launches: `python tools/gpu/attention.py [decode] [prefill]`.

Decode: bytes of keys and values over time, against 4.6 TB/s, each shape in a CUDA graph of launches that walk through
enough separate rows to leave no reuse in L2. Prefill: 4 * heads * dim operations for every visible pair of tokens,
against 790 TFLOP/s; also what the host spends on planning a step and on each launch of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.cuda import attention_decode, attention_prefill
from octavo.kernels.cuda.attention_decode import DecodeConfig
from octavo.kernels.cuda.attention_hopper import Hopper
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
    """`rows` rows in shuffled pages, `copies` times over, so that copies never share a page.

    They have `length` tokens each, or `uneven` an eighth of it to all of it, in random order.
    """

    def __init__(
        self, rows: int, length: int, kv_heads: int, dim: int, *, uneven: bool = False, heads_first: bool = False
    ) -> None:
        pages = -(-length // PAGE)
        size = 2 * rows * length * kv_heads * dim * 2
        self.copies = max(1, min(256, 400_000_000 // size))
        total = self.copies * rows * pages
        shape = (2, total, kv_heads, PAGE, dim) if heads_first else (2, total, PAGE, kv_heads, dim)
        memory = torch.randn(shape, dtype=BF16, device="cuda")
        self.k, self.v = memory.transpose(2, 3) if heads_first else memory
        self.table = torch.randperm(total, device="cuda").to(torch.int32).view(self.copies * rows, pages)
        self.rows = torch.arange(self.copies * rows, device="cuda").view(self.copies, rows)
        lens = torch.linspace(length // 8 if uneven else length, length, rows)[torch.randperm(rows)].to(torch.int32)
        self.seq_lens, self.tokens = lens.cuda(), int(lens.sum())
        self.order = lens.argsort(descending=True).to(torch.int32).cuda() if uneven else None


def decode_candidates(rows: int, kv_heads: int, group: int, dim: int, length: int) -> Iterator[DecodeConfig]:
    yield attention_decode.config(rows, kv_heads, group, dim, length)
    shapes = [(32, 2, 5), (64, 2, 3), (64, 4, 3), (64, 4, 5), (128, 4, 2)]
    base, most = max(1, 132 * 4 // (rows * kv_heads)), min(64, -(-length // 32))
    splits = sorted({min(most, n) for n in (base, 2 * base, 4 * base)})
    for count, (block_n, warps, stages), fused in product(splits, shapes, (True, False)):
        if count > 1 or not fused:
            yield DecodeConfig(block_n, warps, stages, count, fused)


def time_decode(cache: Cache, q: Tensor, launch: DecodeConfig, pdl: bool = False) -> float:
    out = torch.empty_like(q)
    arrivals = torch.zeros(65536, dtype=torch.int32, device="cuda")
    launches = [
        partial(
            attention_decode.decode, q, cache.k, cache.v, cache.table, cache.rows[i % cache.copies], cache.seq_lens,
            out, launch, scale=0.1, order=cache.order, arrivals=arrivals, pdl=pdl,
        )
        for i in range(max(cache.copies, 4))
    ]  # fmt: skip
    return microseconds(launches)


def decode_table() -> None:
    print("decode: rows x tokens heads/kv/dim: the chosen launch, the best ones | us TB/s %")
    for heads, kv_heads, dim, rows, length, uneven in [
        (32, 8, 128, 1024, 512, False),
        (32, 8, 128, 1024, 512, True),
        (32, 8, 128, 256, 1536, False),
        (32, 8, 128, 256, 1536, True),
        (32, 8, 128, 32, 1152, False),
        (32, 8, 128, 32, 1152, True),
        (32, 8, 128, 8, 1152, False),
        (32, 8, 128, 8, 8192, False),
        (32, 8, 128, 8, 8192, True),
        (32, 8, 128, 32, 16384, False),
        (32, 8, 128, 1, 384, False),
        (16, 8, 128, 256, 800, False),
        (16, 8, 128, 1, 128, False),
        (16, 8, 128, 1, 640, False),
        (32, 8, 64, 128, 1152, False),
    ]:
        cache = Cache(rows, length, kv_heads, dim, uneven=uneven)
        q = torch.randn(rows, heads, dim, dtype=BF16, device="cuda")
        launches = islice(decode_candidates(rows, kv_heads, heads // kv_heads, dim, length), 12)
        results = [(time_decode(cache, q, launch), _short(launch), launch) for launch in launches]
        best = sorted(results[1:], key=lambda r: r[0])[:3]
        lines = [results[0][:2], *(r[:2] for r in best)]
        lines += [(time_decode(cache, q, r[2], True), r[1] + " +PDL") for r in (results[0], best[0])]
        del cache
        if rows in (256, 32) and dim == 128 and length < 2048:
            cache = Cache(rows, length, kv_heads, dim, uneven=uneven, heads_first=True)
            lines.append((time_decode(cache, q, best[0][2]), best[0][1] + " [heads, page]"))
            del cache
        # A graph captured for long rows that replays with short ones.
        cache = Cache(rows, length, kv_heads, dim, uneven=uneven)
        longer = attention_decode.config(rows, kv_heads, heads // kv_heads, dim, 32768)
        lines.append((time_decode(cache, q, longer), _short(longer) + " for 32k"))
        print(f"{rows} x {f'{length // 8} to ' if uneven else ''}{length} {heads}/{kv_heads}/{dim}")
        size = 2 * cache.tokens * kv_heads * dim * 2
        for us, name in lines:
            print(f"  {name:42} {us:8.2f} {size / us / 1e6:5.2f} {size / us / 4.6e6:4.0%}")


def _short(launch: DecodeConfig) -> str:
    merged = "fused" if launch.fused else "combine"
    return f"n{launch.block_n} w{launch.num_warps} s{launch.num_stages} splits {launch.splits} {merged}"


class Rows:
    """Rows of new tokens after cached ones, in shuffled pages, and what the kernels take of them."""

    def __init__(self, heads: int, kv_heads: int, dim: int, new: list[int], cached: int) -> None:
        self.kv_heads, self.new, self.lens = kv_heads, np.array(new, np.int32), np.array(new, np.int32) + cached
        cache = Cache(len(new), int(self.lens.max()), kv_heads, dim)
        q = torch.randn(sum(new), heads, dim, dtype=BF16, device="cuda")
        starts = torch.tensor([0, *np.cumsum(self.new)], dtype=torch.int32, device="cuda")
        lens = torch.from_numpy(self.lens).cuda()
        self.before = (q, cache.k, cache.v, cache.table, cache.rows[0], starts, lens)
        self.out = torch.empty_like(q)
        pairs = (self.new.astype(float) * cached + self.new * (self.new + 1.0) / 2).sum()
        self.operations = 4 * heads * dim * pairs

    def items(self, tokens: int) -> Tensor:
        listed = attention_prefill.tiles(np.arange(len(self.new)), self.new, self.lens, tokens)
        return attention_prefill.upload(listed, self.out.device)


def prefill_table() -> None:
    print("prefill: new tokens (+ cached) heads/kv/dim | us TFLOP/s %")
    mix = np.random.default_rng(0).integers(100, 1025, 16).tolist()
    for heads, kv_heads, dim, new, cached, name in [
        (32, 8, 128, [1024] * 8, 0, "8 x 1024"),
        (32, 8, 128, [4096] * 2, 0, "2 x 4096"),
        (32, 8, 128, [16384], 0, "1 x 16384"),
        (32, 8, 128, [8192], 8192, "1 x 8192 + 8192"),
        (32, 8, 128, mix, 0, "16 of 100..1024"),
        (16, 8, 128, mix, 0, "16 of 100..1024"),
        (16, 8, 128, [550] * 16, 0, "16 x 550"),
        (32, 8, 128, [128] * 64, 0, "64 x 128"),
        (16, 8, 128, [128] * 64, 0, "64 x 128"),
        (32, 8, 128, [5] * 32, 1152, "32 x 5 + 1152"),
        (32, 8, 64, [1024] * 8, 0, "8 x 1024"),
    ]:
        rows = Rows(heads, kv_heads, dim, new, cached)
        print(f"{name} {heads}/{kv_heads}/{dim}")
        for way, run in prefill_ways(rows, heads // kv_heads, dim):
            us = microseconds([run] * 4)
            rate = rows.operations / us / 1e6
            print(f"  {way:30} {us:9.1f} {rate:6.0f} {rate / 790:4.0%}")
        if name == "64 x 128":
            _print_host_cost(rows, heads // kv_heads, dim)


def prefill_ways(rows: Rows, group: int, dim: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for pdl in (False, True):
        for turns in (True, False):
            kernel = Hopper(rows.kv_heads * group, rows.kv_heads, rows.out.device)
            if not turns:
                kernel.programs = 1 << 20
            listed = rows.items(kernel.tokens)
            yield (
                f"hopper{'' if turns else ', a program an item'}{' +PDL' if pdl else ''}",
                partial(kernel.prefill, *rows.before, listed, rows.out, scale=0.1, pdl=pdl),
            )
    launch: PrefillConfig = attention_prefill.config(int(rows.new.max()), group, dim)
    listed = rows.items(launch.block_m // group)
    yield "portable", partial(attention_prefill.prefill, *rows.before, listed, rows.out, launch, scale=0.1)


def _print_host_cost(rows: Rows, group: int, dim: int) -> None:
    kernel = Hopper(rows.kv_heads * group, rows.kv_heads, rows.out.device)
    steps: dict[str, Callable[[], object]] = {"plan": partial(rows.items, kernel.tokens)}
    steps.update(item for item in prefill_ways(rows, group, dim) if item[0] in ("hopper", "portable"))
    for name, step in steps.items():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            step()
        print(f"  host: {name:24} {(time.perf_counter() - begin) * 5e3:9.1f}")
    torch.cuda.synchronize()


def main(sections: list[str]) -> None:
    tables = {"prefill": prefill_table, "decode": decode_table}
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in sections or list(tables):
        begin = time.perf_counter()
        tables[name]()
        print(f"[{name}: {time.perf_counter() - begin:.0f} s]")


if __name__ == "__main__":
    main(sys.argv[1:])
