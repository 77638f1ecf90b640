"""How decode steps are recorded and replayed: CUDA graphs on a GPU, tapes of C kernels on a CPU.

Both record a piece of work over fixed buffers without computing it, and replay it at next to no cost on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.kernels.cpu import build
from octavo.kernels.cpu.native import HALF
from octavo.kernels.cpu.tape import Tapes, Unrecordable

__all__ = ["CpuTapes", "CudaGraphs", "Recorder", "Unrecordable", "recorders_for", "size_class"]

EXACT = 64
"""Rows up to which a padding row would cost a CPU more than another tape."""


class Recorder(Protocol):
    """A replay may overwrite the results of all other replays of its recorder."""

    eager_steps: int
    """Steps of a size that run before it is recorded; they also compile its kernels."""

    def size(self, rows: int) -> int:
        """Rows that a step of `rows` is padded to."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `work`: what replays it, and the tensor that it returns. Raises Unrecordable."""


def recorders_for(device: torch.device, dtype: torch.dtype) -> tuple[Recorder, Recorder] | None:
    """For steps and for the draws from their logits; None where nothing records kernels of `dtype`."""
    if device.type == "cuda":
        graphs = CudaGraphs()
        return graphs, graphs
    return (CpuTapes(), CpuTapes()) if dtype in HALF and build.available() is None else None


def size_class(rows: int) -> int:
    """1, 2, 4, 8, then steps that grow with the size."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 16 if rows <= 128 else 32 if rows <= 512 else 64
    return -(-rows // step) * step


class CpuTapes(Tapes):
    eager_steps = 0

    def size(self, rows: int) -> int:
        return rows if rows <= EXACT else size_class(rows)


class CudaGraphs:
    eager_steps = 2

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def size(self, rows: int) -> int:
        return size_class(rows)

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # the capture may be invalid; what broke it is the error to raise
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(stream)
        return graph.replay, result
