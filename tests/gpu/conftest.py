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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random operands in every run, whichever tests ran before."""
    torch.manual_seed(0)
