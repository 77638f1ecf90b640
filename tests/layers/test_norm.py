"""Sums that ranks make together with the norm take the place of the sum and the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.layers import AddNorm, Build, Linear
from octavo.parallel import Column

SIZE, OUT, EPS = 16, 12, 1e-5


class Other:
    """Two ranks, of which the other one's partial sums are all `value`."""

    rank, size, value = 0, 2, 0.5

    def __init__(self, fused: bool) -> None:
        self.fused, self.sums = fused, 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sums += 1
        return x + self.value

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        return reference.add_rms_norm(x + self.value, residual, weight, eps) if self.fused else None

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("gated", [False, True])
def test_a_fused_sum_gives_what_sum_and_norm_do(gated: bool) -> None:
    torch.manual_seed(0)
    x, residual, gain, matrix = (torch.randn(*shape) for shape in ((3, SIZE), (3, SIZE), (SIZE,), (OUT, SIZE)))
    found: list[list[Tensor]] = []
    for comm in (Other(fused=False), Other(fused=True)):
        nothing: Any = None
        build = Build(torch.float32, torch.device("cpu"), reference, nothing, (), (), comm)
        norm, linear = AddNorm(SIZE, EPS, build), Linear(SIZE, Column({"gate": OUT, "up": OUT}), build)
        norm.weight.copy_(gain)
        linear.tensors()["weight"].copy_(matrix)
        found.append([*norm.add(x, residual), *norm.into(linear, x, residual, gated=gated)])
        assert comm.sums == (0 if comm.fused else 2)
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused)
