"""Where the time of decode steps goes: kernels by time, host work by phase, idle device.

    python tools/gpu/steps.py benchmarks/configs/llama-3.1-8b --rows 1 32 256 [--no-pdl] [--host]

Brings the rows to where all decode, warms up (compiling and capturing), then times steps, and profiles some.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from octavo import LLM, SamplingParams
from octavo.core.request import Request
from octavo.kernels.cuda.launch import without_pdl

MEASURED = 64
"""Steps: sequences that take four blocks of 16 tokens at a time ask again after so many."""


class Phases:
    """Adds up the time spent in methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, label: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - began

        setattr(owner, name, timed)


def start(llm: LLM, rows: int, length: int, steps: int) -> None:
    """Brings `rows` sequences of `length` tokens to where all of them decode."""
    llm.reset_prefix_cache()
    rng = random.Random(rows)
    params = SamplingParams(temperature=0.6, max_tokens=steps, ignore_eos=True, detokenize=False)
    for i in range(rows):
        tokens = [rng.randrange(10_000) for _ in range(length)]
        llm.engine.add(Request(f"{rows}-{i}", tokens, params, 0.0, whole=True))
    engine: Any = llm.engine
    while any(len(seq.tokens) == seq.prompt_len for seq in engine.scheduler.sequences()):
        engine.step()
    torch.cuda.synchronize()


def steps_seconds(llm: LLM, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def finish(llm: LLM) -> None:
    engine: Any = llm.engine
    engine.finish([(seq.request.id, -1) for seq in list(engine.scheduler.sequences())])
    while engine.has_work():
        engine.step()


def kernels(llm: LLM, steps: int) -> None:
    """Prints the device time of each kernel, a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            llm.engine.step()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in rows[:14]:
        total = event.self_device_time_total / steps
        each, count = event.self_device_time_total / event.count, event.count / steps
        print(f"    {total:9.1f} us a step  {count:6.1f} x {each:7.2f}  {event.key[:60]}")
    print(f"    {sum(e.self_device_time_total for e in rows) / steps:9.1f} us a step in all")


def functions(llm: LLM, steps: int) -> None:
    """Prints where the host's time goes; profiling lengthens calls of Python functions."""
    with cProfile.Profile() as found:
        for _ in range(steps):
            llm.engine.step()
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--no-pdl", action="store_true", help="kernel times are true only without overlap")
    parser.add_argument("--host", action="store_true", help="profile the host's functions, too")
    args = parser.parse_args()
    llm = LLM(
        args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.rows),
    )
    phases = Phases()
    engine: Any = llm.engine
    worker = engine._executor._worker
    for owner, name in (
        (engine.scheduler, "schedule"),
        (engine.scheduler, "commit"),
        (worker, "forward"),
        (worker, "sample"),
    ):
        phases.watch(owner, name, name)
    gc.freeze()  # as the engine's process does
    with without_pdl() if args.no_pdl else nullcontext():
        for rows in args.rows:
            start(llm, rows, args.input_len, 400)
            steps_seconds(llm, 20)
            phases.seconds.clear()
            per_step = steps_seconds(llm, MEASURED)
            host = {name: f"{1e6 * seconds / MEASURED:.0f}" for name, seconds in phases.seconds.items()}
            print(f"\n{rows} rows: {1e3 * per_step:.3f} ms a step; host us a step {host}")
            if args.host:
                functions(llm, MEASURED)
            kernels(llm, 20)
            finish(llm)


if __name__ == "__main__":
    main()
