"""Throughput and latency of an engine in this process. Prompts are token ids, so no tokenizer is loaded."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from octavo.bench.report import Result, emit, machine, percentiles, table
from octavo.bench.roofline import Limits, known_limits, measure_limits, work_of
from octavo.bench.workloads import Workload, named, uniform
from octavo.config.args import EngineArgs
from octavo.config.engine import EngineConfig
from octavo.config.flags import parse_given
from octavo.core.errors import ConfigError, EngineDead
from octavo.core.params import SamplingParams
from octavo.core.request import Stats
from octavo.frontend.inputs import TokensPrompt
from octavo.frontend.startup import logger
from octavo.llm import LLM

THROUGHPUT_COLUMNS = {
    "workload": "workload",
    "requests": "requests",
    "input_tokens": "in tokens",
    "output_tokens": "out tokens",
    "seconds": "seconds",
    "output_tokens_per_s": "out tok/s",
    "total_tokens_per_s": "total tok/s",
    "roofline_percent_measured": "roofline %",
    "bandwidth_percent": "bandwidth %",
    "measured_gb_per_s": "of GB/s",
    "matmul_percent": "matmul %",
    "measured_tflops": "of TFLOP/s",
    "kv_use_percent": "KV use %",
    "preemptions": "preempted",
    "steps": "steps",
    "host_us_per_step": "host us/step",
    "gpu_idle_percent": "GPU idle %",
}
LATENCY_COLUMNS = {"batch_size": "batch", "mean": "mean s", "p50": "p50 s", "p90": "p90 s", "p99": "p99 s"}


def throughput(namespace: argparse.Namespace) -> int:
    """`octavo bench throughput`: each workload's requests are given at once; the time is that of `generate`."""
    args = _engine_args(namespace)
    if namespace.workload is None:
        workloads = [uniform("custom", namespace.num_prompts, namespace.input_len, namespace.output_len)]
    else:
        workloads = [named(name.strip(), args.seed) for name in namespace.workload.split(",")]
    runs = [(w, sequential) for w in workloads for sequential in ((False, True) if namespace.sequential else (False,))]
    with _open(args) as llm:
        for workload in workloads:
            check_fits(workload, llm.config.scheduler.max_model_len)
        llm.warm_up()
        _generate(llm, _warmup(llm.config), args.seed, namespace.temperature)
        device = llm.config.device
        multiplies = llm.config.dtype if device.kind == "cuda" or device.native_bfloat16 else "float32"
        limits = measure_limits(device.kind, multiplies)
        results: list[Result] = []
        for workload, sequential in runs:
            results.append(measure(llm, workload, args.seed, namespace.temperature, limits, sequential=sequential))
            emit(results[-1], namespace.output_json, more=len(results) > 1)
    print(table(THROUGHPUT_COLUMNS, results))
    return 0


def _warmup(config: EngineConfig) -> Workload:
    """On a GPU so much that every library has loaded its kernels; else next to nothing.

    Steps full of long prompts, then steps that each take up twice as many new sequences as the one before, beside
    those that go on, up to all that may run.
    """
    if config.device.kind == "cpu":
        return uniform("warmup", 1, 8, 4)
    tokens, rows = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    longest = config.scheduler.max_model_len - 4
    full = tokens // longest + 2
    inputs, outputs, group = [longest] * full, [4] * full, 4
    while len(inputs) < rows:
        group = min(2 * group, rows - len(inputs))
        inputs += [max(1, min(tokens // (2 * group), longest - 12))] * group
        outputs += [16] * group
    return Workload("warmup", tuple(inputs), tuple(outputs))


def latency(namespace: argparse.Namespace) -> int:
    """`octavo bench latency`: the time of one batch from start to end, again and again."""
    args = _engine_args(namespace)
    workload = uniform("latency", namespace.batch_size, namespace.input_len, namespace.output_len)
    seconds = []
    with _open(args) as llm:
        check_fits(workload, llm.config.scheduler.max_model_len)
        for i in range(namespace.num_iters_warmup + namespace.num_iters):
            began = time.perf_counter()
            _generate(llm, workload, args.seed, namespace.temperature)
            if i >= namespace.num_iters_warmup:
                seconds.append(time.perf_counter() - began)
        result = {
            "benchmark": "latency",
            **_engine_facts(llm),
            "batch_size": namespace.batch_size,
            "input_len": namespace.input_len,
            "output_len": namespace.output_len,
            "iterations": len(seconds),
            **percentiles(seconds),
            **machine(),
        }
    print(table(LATENCY_COLUMNS, [result]))
    emit(result, namespace.output_json)
    return 0


def check_fits(workload: Workload, max_model_len: int) -> None:
    """Raises ConfigError when a request of `workload` exceeds the context."""
    if workload.longest > max_model_len:
        raise ConfigError(
            f"workload {workload.name} has requests of {workload.longest} tokens, the context holds {max_model_len}: "
            "raise --max-model-len or lower --input-len and --output-len"
        )


def measure(
    llm: LLM, workload: Workload, seed: int, temperature: float, limits: Limits, *, sequential: bool = False
) -> Result:
    """Runs `workload` once, all requests at once or one after another, with an empty prefix cache.

    `limits` are those of one rank's device, measured on the spot; known ones are reported beside them.
    """
    before = llm.stats
    seconds = _generate(llm, workload, seed, temperature, sequential=sequential)
    after = llm.stats
    tokens_in, tokens_out = sum(workload.inputs), sum(workload.outputs)
    return {
        "benchmark": "throughput",
        "workload": workload.name + (" (sequential)" if sequential else ""),
        **_engine_facts(llm),
        "requests": len(workload.inputs),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "seconds": round(seconds, 6),
        "output_tokens_per_s": round(tokens_out / seconds, 2),
        "total_tokens_per_s": round((tokens_in + tokens_out) / seconds, 2),
        **_roofline(llm.config, workload.alone() if sequential else [workload], seconds, limits),
        "kv_pool_tokens": llm.config.cache.kv_tokens,
        "kv_use_percent": kv_use_percent(before, after),
        "preemptions": after.preemptions - before.preemptions,
        "steps": after.steps - before.steps,
        **_step_costs(before, after),
        **machine(),
    }


def _roofline(config: EngineConfig, workloads: Sequence[Workload], seconds: float, measured: Limits) -> Result:
    """Percent of the roofline's speed with known and with measured limits, for workloads one after another.

    Beside it how much of the measured bandwidth, and of the measured rate of products, the least work amounts to.
    All count the limits of all ranks, as many times one's, which `measured` and the known ones are.
    """
    ranks = config.parallel.ranks
    known, measured = known_limits(config.device.name, config.dtype), measured.of_ranks(ranks)
    works = [work_of(config.model, config.dtype, workload, _weight_bytes(config)) for workload in workloads]

    def percent(limits: Limits | None) -> float | None:
        return None if limits is None else round(100 * sum(work.seconds(limits) for work in works) / seconds, 2)

    return {
        "roofline_percent": percent(None if known is None else known.of_ranks(ranks)),
        "roofline_percent_measured": percent(measured),
        "bandwidth_percent": round(100 * sum(work.read for work in works) / measured.bandwidth / seconds, 2),
        "measured_gb_per_s": round(measured.bandwidth / 1e9, 2),
        "matmul_percent": round(100 * sum(work.operations for work in works) / measured.flops / seconds, 2),
        "measured_tflops": round(measured.flops / 1e12, 3),
    }


def _weight_bytes(config: EngineConfig) -> float | None:
    """Of an element of a quantized matrix, as its file has it or as int8 with its scales; None: those of the dtype."""
    if config.quantization == "int8":
        return 8.5 / 8
    if config.quantization in ("native", "auto"):
        return Path(config.model.path).stat().st_size / config.model.num_parameters
    return None


def kv_use_percent(before: Stats, after: Stats) -> float | None:
    """Tokens held per slot in owned blocks, in percent, averaged over the slots of the steps between; None without."""
    slots = after.kv_slots_owned - before.kv_slots_owned
    return round(100 * (after.kv_tokens_held - before.kv_tokens_held) / slots, 3) if slots else None


def _step_costs(before: Stats, after: Stats) -> Result:
    """Host work a step, waiting left out, and the share of time that the device was idle between steps."""
    busy = after.device_busy_seconds - before.device_busy_seconds
    idle = after.device_idle_seconds - before.device_idle_seconds
    steps = max(after.steps - before.steps, 1)
    return {
        "host_us_per_step": round(1e6 * (after.host_seconds - before.host_seconds) / steps, 1),
        "gpu_idle_percent": round(100 * idle / (busy + idle), 2) if busy else None,
    }


def _generate(llm: LLM, workload: Workload, seed: int, temperature: float, *, sequential: bool = False) -> float:
    """Seconds that `workload` takes; the prefix cache is emptied before."""
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in workload.prompts(llm.config.model.vocab_size, seed)]
    common = SamplingParams(temperature=temperature, ignore_eos=True, detokenize=False)
    params = [common.replace(max_tokens=n) for n in workload.outputs]
    batches: Sequence[slice] = [slice(i, i + 1) for i in range(len(prompts))] if sequential else [slice(None)]
    llm.reset_prefix_cache()
    began = time.perf_counter()
    for batch in batches:
        outputs = llm.generate(prompts[batch], params[batch], use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise EngineDead(f"a request of workload {workload.name} failed: {output.error}")
    return time.perf_counter() - began


def _engine_args(namespace: argparse.Namespace) -> EngineArgs:
    args, _, dropped = parse_given(namespace)
    for line in dropped:
        logger.info(line)
    return msgspec.structs.replace(args, skip_tokenizer_init=True)


def _open(args: EngineArgs) -> LLM:
    given = msgspec.structs.asdict(args)
    return LLM(given.pop("model"), **given)


def _engine_facts(llm: LLM) -> Result:
    config = llm.config
    return {
        "model": config.model.path,
        "device": config.device.name,
        "dtype": config.dtype,
        "tensor_parallel_size": config.parallel.tensor,
        "pipeline_parallel_size": config.parallel.pipeline,
    }
