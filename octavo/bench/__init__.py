"""Benchmarks: offline throughput and latency, and a running server under load.

`workloads` says what is asked, `offline` and `serve` ask it, `report` prints. Each run prints a table for people and
one JSON line for programs. Importing this package imports none of them: the command line needs the flags alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from octavo.config.flags import add_engine_flags


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `octavo bench KIND`: throughput, latency or serve."""
    _FLAGS[kind](parser)
    parser.add_argument("--output-json", metavar="FILE", help="Write the JSON lines to this file as well")


def run(kind: str, namespace: argparse.Namespace) -> int:
    """Runs a benchmark; returns the exit code. Raises OctavoError for what cannot be run."""
    if kind == "serve":
        from octavo.bench import serve

        return serve.run(namespace)
    from octavo.bench import offline

    return offline.throughput(namespace) if kind == "throughput" else offline.latency(namespace)


def _throughput_flags(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        metavar="NAME[,NAME]",
        help="bs1, dN (N requests), nano, burst, r1k1k, prefill, long; in place of the three flags below",
    )
    _shape_flags(group, input_len=1024, output_len=128)
    group.add_argument("--num-prompts", type=_positive, default=64, metavar="N", help="Requests (default: 64)")
    group.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0 is greedy (default: 0.6)")
    group.add_argument(
        "--sequential", action="store_true", help="Then run the same requests one after another, for comparison"
    )


def _latency_flags(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    group = parser.add_argument_group("workload")
    _shape_flags(group, input_len=32, output_len=128)
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="Requests at once (default: 8)")
    group.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0 is greedy (default: 0.6)")
    group.add_argument("--num-iters", type=_positive, default=10, metavar="N", help="Timed batches (default: 10)")
    group.add_argument("--num-iters-warmup", type=int, default=2, metavar="N", help="Batches before (default: 2)")


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("model", nargs="?", metavar="MODEL", help="Served model name; the server's first when absent")
    group.add_argument("--model", dest="model_flag", metavar="MODEL", help="The same as MODEL")
    group.add_argument("--base-url", metavar="URL", help="The server, in place of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="The server's address (default: 127.0.0.1)")
    group.add_argument("--port", type=_positive, default=8000, metavar="N", help="The server's port (default: 8000)")
    group.add_argument("--api-key", metavar="KEY", help="Bearer token; also from OCTAVO_API_KEY")
    group = parser.add_argument_group("load")
    _shape_flags(group, input_len=1024, output_len=128)
    group.add_argument("--num-prompts", type=_positive, default=100, metavar="N", help="Requests (default: 100)")
    group.add_argument(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="X",
        help="Requests a second, arriving as a Poisson process; inf sends all at once (default: inf)",
    )
    group.add_argument("--max-concurrency", type=_positive, metavar="N", help="Most requests in flight")
    group.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0 is greedy (default: 0.6)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of prompts and arrivals (default: 0)")
    group.add_argument(
        "--token-id-limit",
        type=_positive,
        default=10_000,
        metavar="N",
        help="Prompts are random token ids below this; lower it for a smaller vocabulary (default: 10000)",
    )


def _shape_flags(group: argparse._ArgumentGroup, *, input_len: int, output_len: int) -> None:
    for name, default, what in (("input", input_len, "prompt"), ("output", output_len, "answer")):
        group.add_argument(
            f"--{name}-len",
            type=_positive,
            default=default,
            metavar="N",
            help=f"Tokens of each {what} (default: {default})",
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


_FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "throughput": _throughput_flags,
    "latency": _latency_flags,
    "serve": _serve_flags,
}
