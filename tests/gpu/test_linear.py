"""The product kernels on a GPU against float64; neither dependent launch nor graphs change a bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from octavo.kernels import reference
from octavo.kernels.cuda.launch import without_pdl
from octavo.kernels.cuda.linear import Norm, _arrivals, add_linear, linear, norm_linear, product
from octavo.kernels.cuda.linear_config import SKINNY_ROWS, Config
from tests.support.gpu import draw
from tests.support.kernel_checks import poisoned

EPS = 1e-5
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}
MODEL_SHAPES = [(6144, 4096), (4096, 4096), (4096, 14336), (4096, 1024), (1024, 2048), (1024, 3072), (960, 576)]
LAUNCHES = [
    Config(1, 4, 1024, stages=2),
    Config(1, 2, 512, 2, stages=1, trigger=0),
    Config(2, 4, 512, trigger=2),
    Config(4, 2, 1024, 8),
    Config(16, 32, 128, stages=3),
    Config(16, 32, 256, stages=4, split=3, groups=4),
    Config(16, 16, 256, stages=2, split=4, groups=4, trigger=0),
    Config(32, 64, 128, stages=4, split=2),
    Config(64, 128, 64, stages=4, split=4, trigger=2),
    Config(128, 128, 64, 8, stages=3, split=2),
]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, gated: bool) -> tuple[Tensor, Tensor]:
    """The composition in float64 on the rounded stream."""
    stream = x if norm is None or norm.residual is None else x + norm.residual
    h = stream.double()
    if norm is not None:
        h = reference.rms_norm(h, norm.weight.double(), norm.eps)
    y = reference.linear(h, weight.double(), None if bias is None else bias.double())
    return reference.silu_mul(y) if gated else y, stream


def check(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[y.dtype] * expected.norm()


@pytest.mark.parametrize("given", LAUNCHES, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_product(given: Config, dtype: torch.dtype) -> None:
    for n, k in ((96, 1024), (250, 1032), (514, 3000)):
        for m in {1, given.rows - given.rows // 3, given.rows}:
            x, weight, bias = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5), draw(n, dtype=dtype)
            for gated in (False, True):
                with poisoned():
                    y, _ = product(x, weight, bias, given, gated=gated)
                check(y, exact(x, weight, bias, None, gated)[0])


@pytest.mark.parametrize("given", [launch for launch in LAUNCHES if launch.rows <= 4], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_in_the_same_pass(given: Config, dtype: torch.dtype, residual: bool) -> None:
    for n, k in ((96, 1024), (250, 1032), (514, 3000)):
        for m in {1, given.rows}:
            x, weight = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5)
            norm = Norm(draw(m, k, dtype=dtype) if residual else None, draw(k, dtype=dtype), EPS)
            for gated in (False, True):
                with poisoned():
                    y, stream = product(x, weight, None, given, norm=norm, gated=gated)
                expected, total = exact(x, weight, None, norm, gated)
                check(y, expected)
                assert torch.equal(stream, total)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 17, 32, 33, 64, 65, 130])
def test_the_chosen_launches(m: int) -> None:
    for n, k in MODEL_SHAPES:
        x, residual, weight = draw(m, k), draw(m, k), draw(n, k, scale=k**-0.5)
        gain = draw(k)
        with poisoned():
            check(linear(x, weight, None), exact(x, weight, None, None, False)[0])
        for gated in (False, True):
            with poisoned():
                y, stream = norm_linear(x, residual, gain, EPS, weight, None, gated)
            expected, total = exact(x, weight, None, Norm(residual, gain, EPS), gated)
            check(y, expected)
            assert torch.equal(stream, total)


@pytest.mark.parametrize("m", [1, SKINNY_ROWS, SKINNY_ROWS + 1, 300])
def test_sums_onto_the_stream(m: int) -> None:
    """Of more rows than own kernels multiply; where it says no, nothing is done."""
    x, weight, stream = draw(m, 1024), draw(520, 1024, scale=1 / 32), draw(m, 520)
    before = stream.clone()
    assert not add_linear(x, weight, draw(520), stream)
    assert not add_linear(x, weight, None, draw(m, 1040)[:, ::2])
    assert torch.equal(stream, before)
    assert add_linear(x, weight, None, stream) == (m > SKINNY_ROWS)
    added = reference.linear(x.double(), weight.double(), None) if m > SKINNY_ROWS else 0.0
    check(stream, before.double() + added)


def test_other_operands_go_to_the_plain_product() -> None:
    x, weight = draw(2, 64), draw(64, 32).t()
    assert torch.equal(linear(x, weight, None), reference.linear(x, weight, None))
    assert linear(x[:0], weight.contiguous(), None).shape == (0, 32)
    check(linear(x.float(), weight.float(), None), x.double() @ weight.double().t())


def model(m: int, layers: int = 4, hidden: int = 1024, size: int = 3072) -> tuple[Tensor, Tensor, list[Tensor]]:
    weights = [
        draw(*shape, scale=shape[1] ** -0.5)
        for _ in range(layers)
        for shape in ((hidden, hidden), (2 * size, hidden), (hidden, size))
    ]
    return draw(m, hidden), draw(hidden), weights


def run(x: Tensor, gain: Tensor, weights: list[Tensor]) -> Tensor:
    """A chain as models run it, without attention."""
    stream: Tensor | None = None
    for i in range(0, len(weights), 3):
        x, stream = norm_linear(x, stream, gain, EPS, weights[i], None)
        x, stream = norm_linear(x, stream, gain, EPS, weights[i + 1], None, True)
        x = linear(x, weights[i + 2], None)
    return x


@pytest.mark.parametrize("m", [1, 3, 8, 32, 64])
def test_graphs_with_dependent_launch_give_the_same_bits(m: int) -> None:
    """Every replay equals the chain launched one by one; split sums and the order of programs do not show."""
    x, gain, weights = model(m)
    inputs = [draw(*x.shape) for _ in range(8)]
    with without_pdl():
        expected = [run(given, gain, weights) for given in inputs]
    run(x, gain, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, gain, weights)
    for _ in range(10):
        for given, wanted in zip(inputs, expected, strict=True):
            x.copy_(given)
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, wanted)


def test_counters_are_zero_again() -> None:
    x, weight = draw(8, 2048), draw(1024, 2048)
    product(x, weight, None, Config(16, 32, 256, stages=4, split=4, groups=4))
    assert not _arrivals(x.device).any()
