"""`octavo plan`: which parallel sizes fit a model on GPUs that need not be here, and the KV tokens that they leave.

Arithmetic of `resolve` over the model's header alone; loads nothing. Exit code 2 when no size fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import msgspec

from octavo.config import EngineArgs, resolve
from octavo.config.engine import EngineConfig
from octavo.config.flags import integer, parse_given
from octavo.config.kv import DTYPE_BYTES
from octavo.config.parallel import rank_parameters
from octavo.config.resolve import GIB
from octavo.core.errors import ConfigError
from octavo.core.facts import DeviceFacts, ModelFacts

COLUMNS = ("tensor", "pipeline", "replicas", "weights per GPU", "KV tokens of each")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPUs")
    group.add_argument("--gpus", type=int, default=1, metavar="N", help="How many there are (1)")
    group.add_argument(
        "--gpu-memory",
        type=integer,
        required=True,
        metavar="BYTES",
        help="Memory of each: 80G is 80 GiB, 80g is 80e9",
    )


def run(namespace: argparse.Namespace) -> int:
    from octavo.formats import locate, read_facts

    args, _, dropped = parse_given(namespace)
    for line in dropped:
        print(f"octavo: {line}", file=sys.stderr)
    _check(args, namespace.gpus, namespace.gpu_memory)
    facts = read_facts(locate(args.model, args.revision), args.generation_config)
    gpu = gpu_of(namespace.gpu_memory, namespace.gpus)
    print(f"{facts.path}: {facts.architecture}, {facts.num_layers} layers, {facts.num_parameters:,} parameters")
    print(f"{gpu.count} x {gpu.total_memory / GIB:.2f} GiB")
    rows, refused = options(args, facts, gpu)
    if rows:
        _print_table(rows)
        best = rows[0].parallel
        print(f"take --tensor-parallel-size {best.tensor} --pipeline-parallel-size {best.pipeline}")
    for tensor, pipeline, reason in refused:
        print(f"not {tensor} x {pipeline}: {reason}")
    return 0 if rows else 2


def _check(args: EngineArgs, gpus: int, memory: int) -> None:
    """Raises ConfigError for what GPUs cannot be or do, and for the sizes that are the answer."""
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}: give 1 or more")
    if memory < 1:
        raise ConfigError(f"--gpu-memory is {memory}: give the bytes of one GPU, such as 80G")
    if args.tensor_parallel_size * args.pipeline_parallel_size > 1:
        raise ConfigError(
            "plan tries all parallel sizes: leave out --tensor-parallel-size and --pipeline-parallel-size"
        )
    if args.device not in ("auto", "cuda"):
        raise ConfigError(f"--device is {args.device!r}, but plan is about GPUs that need not be here: leave it out")
    if args.quantization not in ("auto", "none"):
        raise ConfigError(f"--quantization is {args.quantization!r}, which is for CPUs: leave it out")


def gpu_of(memory: int, count: int) -> DeviceFacts:
    """A GPU of `memory` bytes, all of them free, with `count` alike."""
    return DeviceFacts(
        kind="cuda", name="a GPU", total_memory=memory, free_memory=memory, native_bfloat16=True, count=count
    )


def options(
    args: EngineArgs, facts: ModelFacts, gpu: DeviceFacts
) -> tuple[list[EngineConfig], list[tuple[int, int, str]]]:
    """What fits, fewest GPUs of an engine first and fewer stages before more; what does not, and why."""
    fits, refused = [], []
    for tensor, pipeline in _sizes(gpu.count):
        sized = msgspec.structs.replace(args, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        try:
            fits.append(resolve(sized, facts, gpu)[0])
        except ConfigError as error:
            refused.append((tensor, pipeline, str(error)))
    return fits, refused


def _sizes(gpus: int) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) whose product divides the GPUs, in rising order of the product."""
    for ranks in (n for n in range(1, gpus + 1) if gpus % n == 0):
        yield from ((ranks // stages, stages) for stages in range(1, ranks + 1) if ranks % stages == 0)


def _print_table(rows: list[EngineConfig]) -> None:
    lines: list[tuple[str, ...]] = [COLUMNS]
    for config in rows:
        tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
        weights = rank_parameters(config.model, tensor, pipeline) * DTYPE_BYTES[config.dtype]
        replicas = config.device.count // config.parallel.ranks
        figures = (tensor, pipeline, replicas, f"{weights / GIB:.2f} GiB", config.cache.kv_tokens)
        lines.append(tuple(map(str, figures)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
