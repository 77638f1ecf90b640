"""The Hopper product kernel against float64; neither dependent launch nor graphs nor timing change a bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from octavo.kernels import reference
from octavo.kernels.cuda.launch import without_pdl
from octavo.kernels.cuda.linear_config import HopperConfig
from octavo.kernels.cuda.linear_hopper import covers, hopper_linear
from tests.support.gpu import draw
from tests.support.kernel_checks import poisoned

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
LAUNCHES = [
    HopperConfig(False, 2, 64, 256, 4),
    HopperConfig(False, 2, 128, 128, 4, 1, band=3),
    HopperConfig(True, 2, 64, 256, 4),
    HopperConfig(True, 2, 128, 128, 4, 1),
    HopperConfig(True, 2, 64, 64, 8),
    HopperConfig(True, 1, 64, 64, 12),
]


def verify(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, config: HopperConfig) -> None:
    assert covers(x, weight, bias, gated)
    with poisoned():
        y = hopper_linear(x, weight, bias, gated=gated, config=config)
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        expected = reference.silu_mul(expected)
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[y.dtype] * expected.norm()
    assert ((y.double() - expected).abs() <= 0.01 * expected.abs() + 0.01).all()


@pytest.mark.parametrize("config", LAUNCHES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_ragged_sizes(config: HopperConfig, gated: bool, dtype: torch.dtype) -> None:
    x_rows, w_rows = config.tile()
    for m, n, k in ((1, 16, 8), (x_rows - 3, 1072, 1032), (2 * x_rows + 1, 70 * w_rows + 16, 520), (9, 512, 4096)):
        x, weight, bias = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5), draw(n, dtype=dtype)
        verify(x, weight, None, gated, config)
        verify(x, weight, bias, gated, config)


def test_what_it_covers() -> None:
    x, weight = draw(4, 64), draw(48, 64)
    assert covers(x, weight, None, True)
    assert not covers(x, weight[:40], None, True)
    assert covers(x, weight[:40], draw(40), False)
    assert not covers(x, weight[:36], None, False)
    assert not covers(x[:, :60].contiguous(), weight[:, :60].contiguous(), None, False)
    assert not covers(x[:, :32], weight[:, :32].contiguous(), None, False)
    assert not covers(x.view(-1)[1:193].view(3, 64), weight, None, False)
    assert not covers(x.float(), weight.float(), None, False)
    assert not covers(x, weight.half(), None, False)
    assert not covers(x[:0], weight, None, False)


@pytest.mark.parametrize("config", LAUNCHES, ids=str)
def test_graphs_with_dependent_launch_give_the_same_bits(config: HopperConfig) -> None:
    """Every replay equals the chain launched one by one."""
    m, hidden, size = config.tile()[0], 1024, 3072
    weights = [
        (draw(*shape, scale=shape[1] ** -0.5), shape[0] == 2 * size)
        for _ in range(4)
        for shape in ((hidden, hidden), (2 * size, hidden), (hidden, size))
    ]

    def run(x: Tensor) -> Tensor:
        for weight, gated in weights:
            x = hopper_linear(x, weight, gated=gated, config=config)
        return x

    inputs = [draw(m, hidden) for _ in range(8)]
    with without_pdl():
        expected = [run(given) for given in inputs]
    x = draw(m, hidden)
    run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    for _ in range(10):
        for given, wanted in zip(inputs, expected, strict=True):
            x.copy_(given)
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, wanted)
