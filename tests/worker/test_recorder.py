"""A recording that fails ends its capture, and what broke it is raised. The CUDA graph is a stand-in."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from octavo.worker.recorder import CudaGraphs


@pytest.mark.parametrize("invalid", [False, True])
def test_a_failed_recording_ends_its_capture(invalid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def end() -> None:
        calls.append("end")
        if invalid:
            raise RuntimeError("the capture was invalidated")

    graph = SimpleNamespace(capture_begin=lambda **_: calls.append("begin"), capture_end=end, replay=None)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, made in {
        "CUDAGraph": graph,
        "graph_pool_handle": None,
        "current_stream": stream,
        "Stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda made=made: made)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def work() -> Tensor:
        raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        CudaGraphs().record(work)
    assert calls == ["begin", "end"]
