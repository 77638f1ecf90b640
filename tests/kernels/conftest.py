"""What the tests of the C kernels share: targets to compile for, and memory that is NaN before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.kernels.cpu import build, native


def targets() -> list[tuple[str, ...]]:
    """This processor, the plainest x86-64, and one with AVX2."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    haswell = [("-march=haswell",)] if " avx2 " in flags and " fma " in flags else []
    return [build.NATIVE, *([("-march=x86-64",), *haswell] if " sse2 " in flags else [])]


@pytest.fixture(params=targets(), ids=lambda flags: flags[0].removeprefix("-march="))
def target(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels are those compiled for a target."""
    if (reason := build.available()) is not None:
        pytest.skip(reason)
    with native.use(request.param):
        yield


@pytest.fixture
def poison() -> Iterator[None]:
    """`torch.empty` gives NaN, so an element that a kernel forgets is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
