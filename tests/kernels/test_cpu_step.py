"""The C kernels that prepare a step, against the reference."""

from __future__ import annotations

import sys

import pytest
import torch

from octavo.kernels import cpu, reference
from octavo.kernels.cpu import build
from tests.support import kernel_checks as checks

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(build.available() is not None, reason="needs a C compiler"),
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 37])
def test_prepare_decode(size: int, groups: int) -> None:
    checks.check_prepare_decode(sys.modules[cpu.__name__], "cpu", size, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embedding_copies_rows(dtype: torch.dtype) -> None:
    table = torch.randn(50, 7).to(dtype)
    for count in (0, 1, 9):
        tokens = torch.randint(0, 50, (count,))
        assert torch.equal(cpu.embedding(tokens, table), table[tokens])


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("per_token", [False, True])
def test_rotation(per_token: bool) -> None:
    positions = torch.tensor([0, 1, 2, 77, 4095, 131_071])
    inv_freq = 1e4 ** -torch.linspace(0, 1, 16)
    if per_token:
        inv_freq = inv_freq * torch.rand(6, 16)
    for found, wanted in zip(
        cpu.rotation(positions, inv_freq, 1.25), reference.rotation(positions, inv_freq, 1.25), strict=True
    ):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-7)
