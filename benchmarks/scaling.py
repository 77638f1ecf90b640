"""What 1 to 8 GPUs should reach: a model of a step, from kernels measured on one H200 and link times measured on two.

    python -m benchmarks.scaling                prints the tables of benchmarks/scaling.md
    python -m benchmarks.scaling measure        runs them on this machine's GPUs, beside the predictions: the 8B shape
                                                with TP 1, TP 2 and PP 2; other shapes and sizes by its flags

Every constant is a measurement (benchmarks/gpu.md, or the link table in scaling.md) or named as an assumption there. A
prediction for a model that was measured on one GPU is that measurement times the model's ratio, so that errors common
to both sides cancel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.bench.workloads import Workload, named
from octavo.core.facts import ModelFacts
from octavo.formats import read_facts

CONFIGS = Path(__file__).parent / "configs"
MEASURED = {
    "llama-3.1-8b": {"bs1": 263, "d8": 1489, "d32": 3777, "d128": 6082, "d256": 6517, "burst": 17240, "r1k1k": 9862}
}
"""Output tokens a second on one H200: A of gpu.md."""
STEP_TOKENS = 8192
"""Prompt tokens of a prefill step."""


@dataclass(frozen=True)
class Machine:
    """Rates of one H200 and of its links; seconds, bytes a second, operations a second."""

    read: float = 4.64e12
    product_start: float = 1.9e-6
    decode_flops: float = 625e12
    prefill_flops: float = 660e12
    prefill_attention_flops: float = 600e12
    prefill_elementwise: float = 0.06
    """Norms and SiLU-mul beside prefill's products, as a share of these on one GPU; half of it is divided by ranks."""
    kv_read: float = 4.0e12
    attention_start: float = 7e-6
    norm_start: float = 2.0e-6
    norm_row: float = 5.3e-9
    """At hidden size 4096."""
    rope_start: float = 1.2e-6
    rope_row: float = 8.6e-9
    silu_row: float = 23e-9
    """From 33 rows on; below it is fused."""
    draw_row: float = 0.57e-6
    reduce_start: float = 6.3e-6
    reduce_doubling: float = 1.5e-6
    """Assumed: what each doubling of the ranks beyond two adds to the latency."""
    link: float = 308e9
    """Of an all-reduce over peer-mapped memory between two GPUs, 512 KB to 4 MB."""
    send: float = 21e-6

    def overhead(self, rows: float) -> float:
        """Measured over modelled time of the products of a memory-bound step."""
        return float(np.interp(np.log2(max(rows, 1)), [0, 3, 5], [1.08, 1.14, 1.19]))


@dataclass(frozen=True)
class Ranks:
    tensor: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        names = [f"TP {self.tensor}"] * (self.tensor > 1 or self.pipeline == 1) + [f"PP {self.pipeline}"] * (
            self.pipeline > 1
        )
        return " x ".join(names)


def all_reduce(machine: Machine, ranks: int, size: float) -> float:
    """Two-shot: every GPU sends and receives 2 (n - 1) / n of `size` bytes."""
    if ranks == 1:
        return 0.0
    latency = machine.reduce_start + machine.reduce_doubling * np.log2(ranks / 2)
    return float(latency + 2 * (ranks - 1) / ranks * size / machine.link)


def products(facts: ModelFacts) -> tuple[int, ...]:
    """Elements of a layer's matrices."""
    hidden = facts.hidden_size
    return (
        hidden * (facts.q_size + 2 * facts.kv_size),
        facts.q_size * hidden,
        2 * hidden * facts.intermediate_size,
        hidden * facts.intermediate_size,
    )


def product_seconds(machine: Machine, elements: float, rows: float) -> float:
    memory = (2 * elements / machine.read + machine.product_start) * machine.overhead(rows)
    return max(memory, 2 * rows * elements / machine.decode_flops)


def decode_step(facts: ModelFacts, machine: Machine, tensor: int, rows: float, tokens: float) -> float:
    """Seconds of one token for each of `rows` sequences that hold `tokens` together."""
    layers, size = facts.num_layers, facts.hidden_size / 4096
    kv_ranks = min(tensor, facts.num_kv_heads)
    layer = sum(product_seconds(machine, elements / tensor, rows) for elements in products(facts))
    layer += 2 * 2 * facts.kv_size / kv_ranks * tokens / machine.kv_read + machine.attention_start
    layer += machine.rope_start + machine.rope_row * rows * size / tensor
    layer += machine.silu_row * rows * facts.intermediate_size / 14336 / tensor if rows > 32 else 0.0
    layer += 2 * (machine.norm_start + machine.norm_row * rows * size) if rows > 1 or tensor > 1 else 0.0
    layer += 2 * all_reduce(machine, tensor, 2 * rows * facts.hidden_size)
    head = product_seconds(machine, facts.vocab_size * facts.hidden_size / tensor, rows)
    gather = all_reduce(machine, tensor, 2 * rows * facts.vocab_size) / 2
    return layers * layer + head + gather + machine.draw_row * rows


def prefill_seconds(facts: ModelFacts, machine: Machine, tensor: int, workload: Workload) -> float:
    inputs = np.asarray(workload.inputs, np.float64)
    elements = facts.num_layers * sum(products(facts))
    work = 2 * elements * inputs.sum() / machine.prefill_flops
    pairs = facts.num_layers * 4 * facts.q_size * float((inputs * inputs / 2).sum())
    attention = pairs / machine.prefill_attention_flops
    small = machine.prefill_elementwise * work
    steps = max(inputs.sum() / STEP_TOKENS, 1)
    reduces = 2 * facts.num_layers * all_reduce(machine, tensor, 2 * inputs.sum() / steps * facts.hidden_size)
    return float((work + attention + small / 2) / tensor + small / 2 + steps * reduces)


def seconds(facts: ModelFacts, machine: Machine, ranks: Ranks, workload: Workload) -> float:
    """Of the whole workload. A pipeline's stages work on equal shares of the rows at the same time."""
    stages = ranks.pipeline
    total = prefill_seconds(facts, machine, ranks.tensor, workload) / stages
    inputs, outputs = np.asarray(workload.inputs), np.asarray(workload.outputs)
    for step in range(1, outputs.max()):
        alive = outputs > step
        rows, tokens = int(alive.sum()) / stages, float((inputs[alive] + step).sum()) / stages
        one = decode_step(facts, machine, ranks.tensor, max(rows, 1), tokens)
        total += one + (stages * machine.send if stages > 1 else 0.0)
    return float(total)


def predict(name: str, ranks: Ranks, workload: str, machine: Machine = Machine()) -> float:
    """Output tokens a second."""
    facts = read_facts(CONFIGS / name)
    work = named(workload, 0)
    rate = sum(work.outputs) / seconds(facts, machine, ranks, work)
    measured = MEASURED.get(name, {}).get(workload)
    if measured is None:
        return rate
    return measured * rate * seconds(facts, machine, Ranks(), work) / sum(work.outputs)


def table(name: str, columns: dict[str, Ranks], workloads: tuple[str, ...]) -> str:
    lines = [f"| {name}, out tok/s | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for workload in workloads:
        rates = [predict(name, ranks, workload) for ranks in columns.values()]
        shown = [f"{rate:,.0f} ({rate / rates[0]:.2f}x)" if i else f"{rate:,.0f}" for i, rate in enumerate(rates)]
        lines.append(f"| {workload} | {' | '.join(shown)} |")
    return "\n".join(lines)


def tables() -> None:
    tensor = {f"TP {n}": Ranks(n) for n in (1, 2, 4, 8)}
    print(table("llama-3.1-8b", {**tensor, "PP 2": Ranks(1, 2)}, ("bs1", "d8", "d32", "d128", "d256", "burst")))
    print()
    few = {f"TP {n}": Ranks(n) for n in (2, 4, 8)}
    print(table("llama-3.1-70b", few, ("bs1", "d32", "d256", "burst")))
    print()
    slow = replace(Machine(), reduce_start=18.5e-6)
    rates = [predict("llama-3.1-8b", Ranks(2), workload, slow) for workload in ("bs1", "d32", "d256", "burst")]
    print("8B at TP 2 with NCCL's latency:", ", ".join(f"{rate:,.0f}" for rate in rates))


REPLAYS, SUMS = 50, 32
"""Timed replays of a graph, and the all-reduces in it."""


def measure(name: str, sizes: Sequence[Ranks], workloads: Sequence[str], seconds: float, output: str | None) -> None:
    """Runs the workloads with every size of ranks and the all-reduces of it alone, and prints both after each.

    Raises SystemExit after `seconds`, or when one of the runs fails.
    """
    until = time.monotonic() + seconds
    found: dict[Ranks, dict[str, Any]] = {}
    for ranks in sizes:
        flags = ["--model", str(CONFIGS / name), "--load-format", "dummy", "--max-model-len", "2048"]
        flags += ["--tensor-parallel-size", str(ranks.tensor), "--pipeline-parallel-size", str(ranks.pipeline)]
        with tempfile.NamedTemporaryFile("r") as lines:
            work = ["bench", "throughput", *flags, "--workload", ",".join(workloads), "--output-json", lines.name]
            run([[sys.executable, "-m", "octavo.cli", *work]], until)
            results = [json.loads(line) | {"ranks": str(ranks)} for line in lines]
        found[ranks] = {result["workload"]: result for result in results}
        if output is not None:
            with Path(output).open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)
        print(comparison(name, found, workloads) + "\n", flush=True)
        if ranks.tensor > 1 and ranks.pipeline == 1:
            print(shares(name, ranks, found[ranks], workloads, until) + "\n", flush=True)


def run(commands: list[list[str]], until: float) -> list[str]:
    """What the commands say, run together; all they have started is killed if one fails or the time is up."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) for command in commands
    ]
    try:
        said = [process.communicate(timeout=max(until - time.monotonic(), 0.1))[0] for process in processes]
        for process in processes:
            if process.returncode:
                raise SystemExit(f"{' '.join(process.args)} ended with exit code {process.returncode}")  # type: ignore[arg-type]
        return said
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"{' '.join(error.cmd)} has not ended in time: raise --seconds") from None
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def comparison(name: str, found: dict[Ranks, dict[str, Any]], workloads: Sequence[str]) -> str:
    """Output tokens a second, measured and predicted, and the tokens that the KV cache holds."""
    first = next(iter(found))
    lines = [f"| {name}, out tok/s (predicted) | {' | '.join(map(str, found))} |", "|---" * (1 + len(found)) + "|"]
    for workload in workloads:
        cells, base = [], found[first][workload]["output_tokens_per_s"]
        for ranks, results in found.items():
            rate, expected = results[workload]["output_tokens_per_s"], predict(name, ranks, workload)
            ratio = "" if ranks == first else f" {rate / base:.2f}x"
            relative = "" if ranks == first else f" {expected / predict(name, first, workload):.2f}x"
            cells.append(f"{rate:,.0f}{ratio} ({expected:,.0f}{relative})")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    pools = [results[workloads[0]]["kv_pool_tokens"] for results in found.values()]
    lines.append(f"| KV tokens | {' | '.join(f'{pool:,} ({pool / pools[0]:.2f}x)' for pool in pools)} |")
    return "\n".join(lines)


def shares(name: str, ranks: Ranks, results: dict[str, Any], workloads: Sequence[str], until: float) -> str:
    """Times of all-reduces alone, and what part of the workloads' time per token of all rows they amount to."""
    from octavo.parallel import open_store

    facts, store = read_facts(CONFIGS / name), open_store()
    rows = [len(named(workload, 0).inputs) for workload in workloads]
    common = [str(ranks.tensor), str(store.port), str(facts.hidden_size), *map(str, rows)]
    said = run(
        [[sys.executable, "-m", "benchmarks.scaling", "reduce", str(rank), *common] for rank in range(ranks.tensor)],
        until,
    )
    times = json.loads(said[0])
    lines = [f"| all-reduce, {ranks}, us | {' | '.join(workloads)} |", "|---" * (1 + len(rows)) + "|"]
    for way, taken in times.items():
        lines.append(f"| {way} | {' | '.join(f'{1e6 * one:.1f}' for one in taken)} |")
    machine = Machine()
    expected = [1e6 * all_reduce(machine, ranks.tensor, 2 * count * facts.hidden_size) for count in rows]
    lines.append(f"| predicted | {' | '.join(f'{one:.1f}' for one in expected)} |")
    steps = [count / results[workload]["output_tokens_per_s"] for count, workload in zip(rows, workloads, strict=True)]
    parts = [
        100 * (2 * facts.num_layers + 1) * one / step for one, step in zip(times["as the engine"], steps, strict=True)
    ]
    lines.append(f"| {2 * facts.num_layers + 1} of a step, % of it | {' | '.join(f'{part:.1f}' for part in parts)} |")
    return "\n".join(lines)


def reduce(rank: int, ranks: int, port: int, hidden: int, rows: list[int]) -> None:
    """One rank of the all-reduces of bfloat16 [rows, hidden]; prints their seconds, in a graph, as JSON."""
    import torch
    import torch.distributed as dist

    from octavo.config.parallel import place_of
    from octavo.parallel import Rows, connect, join_store
    from octavo.parallel.comm import HOST

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = join_store(HOST, port)
    times: dict[str, list[float]] = {}
    most = Rows(max(rows), hidden, torch.bfloat16)
    for way, sums in (("as the engine", most), ("NCCL", None)):
        links = connect(
            place_of(rank, ranks, 1),
            dist.PrefixStore(way, store),  # type: ignore[attr-defined]
            device,
            sums=sums,
        )
        times[way] = []
        for count in rows:
            x = torch.zeros(count, hidden, dtype=torch.bfloat16, device=device)
            links.comm.all_reduce(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(SUMS):
                    links.comm.all_reduce(x)
            graph.replay()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(REPLAYS):
                graph.replay()
            torch.cuda.synchronize()
            times[way].append((time.perf_counter() - began) / REPLAYS / SUMS)
    print(json.dumps(times), flush=True)
    os._exit(0)


def _ranks(text: str) -> list[Ranks]:
    return [Ranks(*map(int, one.split("x"))) for one in text.split(",")]


def main() -> None:
    if sys.argv[1:2] == ["reduce"]:
        rank, ranks, port, hidden, *rows = map(int, sys.argv[2:])
        reduce(rank, ranks, port, hidden, rows)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    commands = parser.add_subparsers(dest="command")
    run_ = commands.add_parser("measure", help="on this machine's GPUs")
    run_.add_argument("--model", default="llama-3.1-8b", metavar="NAME", help="Of benchmarks/configs")
    run_.add_argument("--ranks", type=_ranks, default="1x1,2x1,1x2", metavar="TxP,...", help="Tensor x pipeline")
    run_.add_argument("--workloads", default="bs1,d32,d256,burst", metavar="NAME,...")
    run_.add_argument("--seconds", type=float, default=470, metavar="N", help="Limit of all runs together")
    run_.add_argument("--output-json", metavar="FILE", help="Append the runs' JSON lines to it")
    given = parser.parse_args()
    if given.command is None:
        tables()
    else:
        measure(given.model, given.ranks, given.workloads.split(","), given.seconds, given.output_json)


if __name__ == "__main__":
    main()
