"""Times the elementwise and sampling kernels on the GPU: `python tools/gpu/elementwise.py [layers] [sampling] [tune]`.

Microseconds of one launch in a graph of many, with programmatic dependent launch and without, over buffers that exceed
the L2 cache together; the kernels at 8,192 rows also in TB/s of bytes that must move, against 4.6. `tune` compares
launch configurations of the sampling kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from octavo.kernels import cuda
from octavo.kernels.cuda import launch, sampling

BF16 = torch.bfloat16
L2 = 120_000_000

Launch = Callable[[int], object]
"""Launches on the i-th copy of its buffers."""


def microseconds(run: Launch, copies: int, *, pdl: bool = True, least: int = 20) -> float:
    count = -(-least // copies) * copies
    with nullcontext() if pdl else launch.without_pdl():
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                run(i % copies)
    times: list[float] = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return sorted(times[1:])[2]


def copies_of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """[copies, *shape] random, more than L2 holds, at most 64 copies."""
    one = torch.randn(shape, device="cuda").to(dtype)
    copies = min(64, max(2, L2 // (one.numel() * one.element_size())))
    return one.expand(copies, *shape).contiguous()


def layer_kernels(rows: int, hidden: int, wide: int, heads: int, kv_heads: int) -> dict[str, tuple[Launch, int, int]]:
    """Name -> (launch, copies, bytes that must move)."""
    x, residual, weight = (
        copies_of(rows, hidden),
        copies_of(rows, hidden),
        torch.ones(hidden, dtype=BF16, device="cuda"),
    )
    gate_up = copies_of(rows, 2 * wide)
    qkv = copies_of(rows, (heads + 2 * kv_heads) * 128)
    table = torch.randn(20_000, hidden, device="cuda").to(BF16)
    tokens = torch.randint(20_000, (64, rows), device="cuda")
    positions = torch.randint(4000, (rows,), device="cuda")
    inv_freq = torch.rand(64, device="cuda")
    rotation = cuda.rotation(positions, inv_freq, 1.0)
    blocks = max(1024, rows // 16)
    k, v = (torch.zeros(blocks, 16, kv_heads, 128, dtype=BF16, device="cuda") for _ in range(2))
    slots = torch.randperm(blocks * 16, device="cuda")[:rows]
    head = torch.ones(128, dtype=BF16, device="cuda")
    norms = (head, head, 1e-6)
    n = rows * hidden * 2
    write = cuda.rope_norm_write_kv
    qkv_bytes = 2 * rows * (heads + 2 * kv_heads) * 128 * 2
    return {
        "rms_norm": (lambda i: cuda.rms_norm(x[i], weight, 1e-6), len(x), 2 * n),
        "add_rms_norm": (lambda i: cuda.add_rms_norm(x[i], residual[i], weight, 1e-6), len(x), 4 * n),
        "silu_mul": (lambda i: cuda.silu_mul(gate_up[i]), len(gate_up), 3 * rows * wide * 2),
        "embedding": (lambda i: cuda.embedding(tokens[i], table), 64, 2 * n),
        "rotation": (lambda i: cuda.rotation(positions, inv_freq, 1.0), 1, rows * 1024),
        "rope": (lambda i: write(qkv[i], heads, rotation, None, k, v, slots), len(qkv), qkv_bytes),
        "norm+rope": (lambda i: write(qkv[i], heads, rotation, norms, k, v, slots), len(qkv), qkv_bytes),
    }


def batch_kernels(rows: int) -> dict[str, tuple[Launch, int, int]]:
    state = torch.zeros(2, 1025, dtype=torch.int64, device="cuda")
    tables = torch.zeros(1, 1025, 20_000, dtype=torch.int32, device="cuda")
    index = torch.arange(rows, device="cuda")
    out = {
        "tokens": torch.zeros_like(index),
        "positions": torch.zeros_like(index),
        "next_positions": torch.zeros_like(index),
        "seq_lens": torch.zeros(rows, dtype=torch.int32, device="cuda"),
        "slots": torch.zeros(1, rows, dtype=torch.int64, device="cuda"),
    }
    return {
        "prepare_decode": (lambda i: cuda.prepare_decode(index, state[0], state[1], tables, 16, **out), 1, 0),
        "apply_diffs": (
            lambda i: cuda.apply_diffs(tables, index, out["seq_lens"], state[1], index, out["positions"]),
            1,
            0,
        ),
    }


def layers_table() -> None:
    for hidden, wide, heads in ((4096, 14336, 32), (1024, 3072, 16)):
        print(f"hidden {hidden}, us with PDL / without; 8192 rows: us TB/s %")
        columns = []
        for rows in (1, 8, 32, 256, 8192):
            kernels = layer_kernels(rows, hidden, wide, heads, 8)
            if rows <= 256:
                kernels |= batch_kernels(rows)
            columns.append({name: _cell(rows, *entry) for name, entry in kernels.items()})
        for name in columns[0]:
            print(f"  {name:15}" + " ".join(f"{column.get(name, ''):>14}" for column in columns))


def _cell(rows: int, run: Launch, copies: int, size: int) -> str:
    with_pdl = microseconds(run, copies)
    if rows > 256:
        speed = size / with_pdl / 1e6
        return f"{with_pdl:6.1f} {speed:4.2f} {speed / 4.6:4.0%}"
    return f"{with_pdl:5.2f} / {microseconds(run, copies, pdl=False):5.2f}"


FILTERS: dict[str, tuple[int, float, bool]] = {
    "temperature": (0, 1.0, False),
    "same, filters on": (0, 1.0, True),
    "top_k 50": (50, 1.0, True),
    "top_p 0.9": (0, 0.9, True),
    "top_k 50, top_p 0.9": (50, 0.9, True),
}


def sampler(rows: int, vocab: int, dtype: torch.dtype, top_k: int, top_p: float, filtered: bool) -> tuple[Launch, int]:
    logits = copies_of(rows, vocab, dtype=dtype)
    given = {
        "temperature": torch.full((rows,), 0.6, device="cuda"),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
        "top_p": torch.full((rows,), top_p, device="cuda"),
        "min_p": torch.zeros(rows, device="cuda"),
        "seed": torch.arange(rows, device="cuda") * 7919,
        "position": torch.arange(rows, device="cuda"),
    }
    return lambda i: cuda.sample_rows(logits[i], None, **given, offset=i, filtered=filtered), len(logits)


def sampling_table() -> None:
    for vocab, dtype in ((128_256, torch.float32), (151_936, torch.float32), (151_936, BF16)):
        print(f"sample, vocab {vocab} {dtype}, us for rows 1, 32, 256, 1024 (floor: reading the logits once)")
        size = torch.empty((), dtype=dtype).element_size()
        print(f"  {'floor':20}" + " ".join(f"{rows * vocab * size / 4.6e6:9.1f}" for rows in (1, 32, 256, 1024)))
        for name, (top_k, top_p, filtered) in FILTERS.items():
            cells = []
            for rows in (1, 32, 256, 1024):
                run, copies = sampler(rows, vocab, dtype, top_k, top_p, filtered)
                cells.append(f"{microseconds(run, copies, least=8 if rows < 256 else 2):9.1f}")
            print(f"  {name:20}" + " ".join(cells))
        for name, run in logprob_kernels(256, vocab, dtype).items():
            print(f"  {name:20} rows 256: {microseconds(run, 1, least=4):9.1f}")


def logprob_kernels(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Launch]:
    logits = torch.randn(rows, vocab, device="cuda").to(dtype)
    chosen = torch.zeros(rows, dtype=torch.int64, device="cuda")
    return {
        "log_softmax": lambda i: cuda.log_softmax(logits),
        "top_logprobs k 20": lambda i: cuda.top_logprobs(logits, chosen, 20),
        "top_logprobs k 0": lambda i: cuda.top_logprobs(logits, chosen, 0),
    }


def tune_table() -> None:
    """A chunk's size is part of the draw's meaning; the best at 1 row and at 256 decides."""
    print("tune: vocab 151936 float32, us for rows 1, 256")
    chosen = sampling.CHUNK, sampling.DRAW_WARPS, sampling.DRAW_REGISTERS
    for chunk, warps, registers in (
        (2048, 4, None), (2048, 4, 64), (2048, 4, 96), (2048, 8, None), (4096, 8, None), (4096, 8, 64), (1024, 4, None)
    ):  # fmt: skip
        sampling.CHUNK, sampling.DRAW_WARPS, sampling.DRAW_REGISTERS = chunk, warps, registers
        cells = [_tuned(rows, 0, 1.0, False) for rows in (1, 256)]
        print(f"  draw chunk {chunk} warps {warps} registers {registers}: {cells[0]:6.1f} {cells[1]:8.1f}")
    sampling.CHUNK, sampling.DRAW_WARPS, sampling.DRAW_REGISTERS = chosen
    for block, warps in ((4096, 16), (8192, 16), (8192, 32), (4096, 32), (2048, 8)):
        sampling.FILTER_BLOCK, sampling.FILTER_WARPS = block, warps
        cells = [_tuned(rows, k, p, True) for k, p in ((0, 0.9), (50, 1.0)) for rows in (1, 256)]
        print(f"  filter block {block} warps {warps}: top_p {cells[0]:6.1f} {cells[1]:8.1f} "
              f"top_k {cells[2]:6.1f} {cells[3]:8.1f}")  # fmt: skip


def _tuned(rows: int, top_k: int, top_p: float, filtered: bool) -> float:
    run, copies = sampler(rows, 151_936, torch.float32, top_k, top_p, filtered)
    return microseconds(run, copies, least=8 if rows < 256 else 2)


def main() -> None:
    tables = {"layers": layers_table, "sampling": sampling_table, "tune": tune_table}
    print(torch.cuda.get_device_name())
    for name in sys.argv[1:] or ("layers", "sampling"):
        tables[name]()


if __name__ == "__main__":
    main()
