"""Fixtures of the GPU tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[True, False], ids=["pdl", "plain"])
def dependent(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs the test with programmatic dependent launch and without."""
    from octavo.kernels.cuda import launch

    if request.param:
        if not launch.pdl():
            pytest.skip("this GPU has no programmatic dependent launch")
        yield True
        return
    with launch.without_pdl():
        yield False


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture
def poisoned() -> None:
    """Free memory is full of NaN, so that what a kernel does not write is seen."""
    torch.manual_seed(0)
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        for dtype in (torch.bfloat16, torch.float32):
            full = [torch.full((size,), torch.nan, dtype=dtype, device="cuda") for _ in range(4)]
            del full
