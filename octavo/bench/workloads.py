"""What the benchmarks ask: named sets of requests, given by prompt and answer lengths. Pure data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import numpy as np

from octavo.core.errors import ConfigError

TOKEN_ID_LIMIT = 10_000
"""Prompts are random ids below this, or below the vocabulary's size where that is smaller."""


@dataclass(frozen=True)
class Workload:
    """Request i has `inputs[i]` prompt tokens and generates `outputs[i]`, end of sequence ignored."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(i + o for i, o in zip(self.inputs, self.outputs, strict=True))

    def alone(self) -> list[Workload]:
        """A workload for each request."""
        return [uniform(self.name, 1, i, o) for i, o in zip(self.inputs, self.outputs, strict=True)]

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids, the same for the same seed."""
        rng = np.random.default_rng(seed)
        return [rng.integers(0, min(TOKEN_ID_LIMIT, vocab_size), n).tolist() for n in self.inputs]


def uniform(name: str, requests: int, input_len: int, output_len: int) -> Workload:
    """Equal lengths."""
    return Workload(name, (input_len,) * requests, (output_len,) * requests)


def named(name: str, seed: int) -> Workload:
    """A workload of the common list. Raises ConfigError for an unknown name."""
    shapes = {
        "bs1": (1, 128, 512),
        "burst": (1024, 256, 256),
        "r1k1k": (512, 1024, 1024),
        "prefill": (64, 4096, 1),
        "long": (32, 16384, 256),
    }
    if name in shapes:
        return uniform(name, *shapes[name])
    if name == "nano":
        return _nano(seed)
    if match := re.fullmatch(r"d([1-9][0-9]{0,4})", name):
        return uniform(name, int(match[1]), 1024, 256)
    raise ConfigError(f"unknown workload {name!r}: choose from {', '.join([*shapes, 'nano', 'dN'])}")


def _nano(seed: int) -> Workload:
    """256 requests of 100 to 1024 tokens in and out.

    At seed 0 the lengths are those of the benchmark that nano-vllm and mini-sglang publish (133,966 tokens out): it
    draws each prompt's length and tokens, then the answers' lengths, from one generator.
    """
    rng = Random(seed)
    inputs = []
    for _ in range(256):
        inputs.append(rng.randint(100, 1024))
        for _ in range(inputs[-1]):
            rng.randint(0, 10_000)
    return Workload("nano", tuple(inputs), tuple(rng.randint(100, 1024) for _ in range(256)))
