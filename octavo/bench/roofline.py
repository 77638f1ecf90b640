"""The least time that a machine needs for a workload, so that a benchmark can say how far from it a run was.

    time = prefill operations / F + sum over decode steps of max(weight bytes / B, product operations / F)
           + KV bytes read / B

with F operations and B bytes a second of all ranks together, every sequence resident at once and nothing overlapped.
The products are the layers' and, where a token is sampled, the head's; attention costs 4 operations per query, key and
dimension of q.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.bench.workloads import Workload
from octavo.config.kv import DTYPE_BYTES
from octavo.core.facts import ModelFacts

if TYPE_CHECKING:
    import torch


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """What a device can do: operations a second of a matrix product, bytes a second of reading."""

    flops: float
    bandwidth: float

    def of_ranks(self, count: int) -> Limits:
        """N ranks have N times the operations and bandwidth of one; those of one CPU in truth share its memory's."""
        return Limits(count * self.flops, count * self.bandwidth)


KNOWN = {"H200": Limits(790e12, 4.6e12)}
"""By a part of the device's name, for products of 2-byte numbers."""


def known_limits(device: str, dtype: str) -> Limits | None:
    if DTYPE_BYTES[dtype] != 2:
        return None
    return next((limits for name, limits in KNOWN.items() if name in device), None)


@dataclass(frozen=True)
class Work:
    """The least that a workload takes."""

    prefill: float
    """Operations of all prompts."""
    steps: Floats
    """Operations of each decode step."""
    weights: float
    """Bytes that each decode step reads of the weights."""
    kv: float
    """Bytes of keys and values that all decode steps read."""

    @property
    def operations(self) -> float:
        return self.prefill + float(self.steps.sum())

    @property
    def read(self) -> float:
        """Bytes read: the weights once for all prompts and in every step."""
        return self.weights * (1 + len(self.steps)) + self.kv

    def seconds(self, limits: Limits) -> float:
        products = np.maximum(self.weights / limits.bandwidth, self.steps / limits.flops).sum()
        return float(self.prefill / limits.flops + products + self.kv / limits.bandwidth)


def work_of(facts: ModelFacts, dtype: str, workload: Workload, weight_bytes: float | None = None) -> Work:
    """That of all requests of `workload` at once; KV in `dtype`, weights too or of `weight_bytes` an element."""
    size = DTYPE_BYTES[dtype]
    inputs, outputs = np.asarray(workload.inputs, np.float64), np.asarray(workload.outputs)
    head = facts.vocab_size * facts.hidden_size
    layers = _layer_weights(facts)
    steps = np.arange(1, outputs.max())
    alive = outputs[:, None] > steps
    pairs = read = 0.0
    for window, count in Counter(facts.windows).items():
        pairs += count * float(_causal_pairs(inputs, window).sum())
        read += count * float((_seen(inputs[:, None] + steps, window) * alive).sum())
    return Work(
        prefill=2 * (layers * inputs.sum() + head * len(inputs)) + 4 * facts.q_size * pairs,
        steps=2 * (layers + head) * alive.sum(0, dtype=np.float64),
        weights=(layers + head) * (size if weight_bytes is None else weight_bytes),
        kv=2 * facts.kv_size * size * read,
    )


def roofline_seconds(facts: ModelFacts, dtype: str, workload: Workload, limits: Limits) -> float:
    """Least seconds for all requests of `workload` at once, weights and KV in `dtype`."""
    return work_of(facts, dtype, workload).seconds(limits)


def _layer_weights(facts: ModelFacts) -> int:
    """Elements of the matrices of all layers."""
    attention = facts.hidden_size * (2 * facts.q_size + 2 * facts.kv_size)
    return facts.num_layers * (attention + 3 * facts.hidden_size * facts.intermediate_size)


def _seen(lengths: Floats, window: int | None) -> Floats:
    """Keys that the last of `lengths` tokens attends to."""
    return lengths if window is None else np.minimum(lengths, window)


def _causal_pairs(lengths: Floats, window: int | None) -> Floats:
    """Query-key pairs of causal attention over `lengths` tokens."""
    near = _seen(lengths, window)
    return near * near / 2 + (lengths - near) * near


def measure_limits(kind: str, dtype: str) -> Limits:
    """The device's limits, measured on the spot in about a second: a square product, and the sum of a large tensor.

    `dtype` is the product's, one that the device multiplies.
    """
    import torch

    number = getattr(torch, dtype)
    n, nbytes = (8192, 2**30) if kind == "cuda" else (1024, 2**28)
    square = torch.rand((n, n), dtype=torch.float32, device=kind).to(number)
    wide = torch.ones(nbytes // 4, dtype=torch.float32, device=kind)
    sync = torch.cuda.synchronize if kind == "cuda" else lambda: None
    return Limits(2 * n**3 / _best(lambda: square @ square, sync), nbytes / _best(wide.sum, sync))


def _best(work: Callable[[], torch.Tensor], sync: Callable[[], None], repeat: int = 5) -> float:
    """Least seconds of `work`, the first run left out."""
    times = []
    for _ in range(repeat + 1):
        sync()
        began = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - began)
    return min(times[1:])
