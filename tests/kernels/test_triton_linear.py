"""The product kernels under Triton's interpreter, against plain torch. float16, because its bfloat16 dot is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run in tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from octavo.kernels.cuda.linear import Norm, _arrivals, gated_linear, linear, norm_linear, product
from octavo.kernels.cuda.linear_config import MATVEC_ROWS, SKINNY_ROWS, SMALL, TUNED, Config, config

EPS = 1e-5


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=random).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, gated: bool) -> tuple[Tensor, Tensor]:
    """The composition in float64 on the rounded stream."""
    stream = x if norm is None or norm.residual is None else x + norm.residual
    h = stream.double()
    if norm is not None:
        h = reference.rms_norm(h, norm.weight.double(), norm.eps)
    y = reference.linear(h, weight.double(), None if bias is None else bias.double())
    return reference.silu_mul(y) if gated else y, stream


def check(y: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("m", "n", "k", "given"),
    [
        (1, 24, 128, Config(1, 4, 64, stages=1)),
        (1, 22, 200, Config(1, 4, 64, stages=3)),
        (2, 20, 128, Config(2, 2, 128, stages=2)),
        (3, 26, 136, Config(4, 4, 64, stages=2)),
        (16, 40, 128, Config(16, 32, 64, stages=2)),
        (5, 36, 136, Config(16, 16, 64, stages=2, groups=4)),
        (7, 64, 320, Config(16, 32, 64, stages=3, split=3)),
        (17, 50, 200, Config(32, 16, 64, stages=2, split=2, groups=4)),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_product(m: int, n: int, k: int, given: Config, gated: bool, bias: bool, random: torch.Generator) -> None:
    x, weight = draw(random, m, k), draw(random, n, k)
    added = draw(random, n) if bias else None
    y, _ = product(x, weight, added, given, gated=gated)
    check(y, exact(x, weight, added, None, gated)[0])


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_in_the_same_pass(m: int, gated: bool, residual: bool, random: torch.Generator) -> None:
    x, weight, bias = draw(random, m, 200), draw(random, 12, 200), draw(random, 12)
    norm = Norm(draw(random, m, 200) if residual else None, draw(random, 200), EPS)
    y, stream = product(x, weight, bias, Config(4, 4, 64, stages=2), norm=norm, gated=gated)
    expected, total = exact(x, weight, bias, norm, gated)
    check(y, expected)
    assert torch.equal(stream, total)


def test_more_pieces_of_the_stream_than_programs(random: torch.Generator) -> None:
    x, residual = draw(random, 1, 256), draw(random, 1, 256)
    norm = Norm(residual, draw(random, 256), EPS)
    _, stream = product(x, draw(random, 4, 256), None, Config(1, 4, 64), norm=norm)
    assert torch.equal(stream, x + residual)


def test_counters_are_zero_again(random: torch.Generator) -> None:
    """Also with more programs along N in one product than in the next, and results repeat exactly."""
    x, weight = draw(random, 4, 256), draw(random, 64, 256)
    given = Config(16, 16, 64, split=4)
    first, _ = product(x, weight, None, given)
    assert not _arrivals(x.device).any()
    assert torch.equal(product(x, weight, None, given)[0], first)


def test_float32(random: torch.Generator) -> None:
    x, weight = (draw(random, *shape, dtype=torch.float32) for shape in ((3, 128), (20, 128)))
    for given in (Config(4, 4, 64), Config(16, 16, 64, split=2)):
        check(product(x, weight, None, given)[0], exact(x, weight, None, None, False)[0], 1e-6)


@pytest.mark.parametrize("m", [1, 4, 6])
def test_public_functions_agree_with_the_reference(m: int, random: torch.Generator) -> None:
    x, residual, weight = draw(random, m, 96), draw(random, m, 96), draw(random, 64, 96)
    gain = draw(random, 96)
    check(linear(x, weight, None), reference.linear(x, weight, None).double(), 3e-3)
    norm = Norm(residual, gain, EPS)
    for gated in (False, True):
        y, stream = norm_linear(x, residual, gain, EPS, weight, None, gated)
        expected, total = exact(x, weight, None, norm, gated)
        check(y, expected, 3e-3)
        assert torch.equal(stream, total)


def test_other_operands_go_to_the_plain_product(random: torch.Generator) -> None:
    """Transposed weights, strided inputs, no rows, dtypes without a kernel."""
    x, weight = draw(random, 2, 32), draw(random, 32, 16).t()
    assert torch.equal(linear(x, weight, None), reference.linear(x, weight, None))
    assert torch.equal(linear(x.double(), weight.double(), None), x.double() @ weight.double().t())
    assert linear(x[:0], weight.contiguous(), None).shape == (0, 16)
    strided = draw(random, 32, 2).t()
    expected = reference.linear(strided, weight, None)
    assert torch.equal(linear(strided, weight.contiguous(), None), expected)


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, torch.full_like(tensor, 3)), -1)[..., 0]


@pytest.mark.parametrize("m", [1, 6])
def test_strided_side_operands(m: int, random: torch.Generator) -> None:
    x, residual, weight = draw(random, m, 96), draw(random, m, 96), draw(random, 64, 96)
    gain, bias = draw(random, 96), draw(random, 64)
    check(linear(x, weight, spread(bias)), exact(x, weight, bias, None, False)[0], 3e-3)
    expected, total = exact(x, weight, bias, Norm(residual, gain, EPS), True)
    for given in ((spread(residual), gain, bias), (residual, spread(gain), bias), (residual, gain, spread(bias))):
        y, stream = norm_linear(x, given[0], given[1], EPS, weight, given[2], True)
        check(y, expected, 3e-3)
        assert torch.equal(stream, total)


def test_operands_that_do_not_fit_raise(random: torch.Generator) -> None:
    x, weight, bias = draw(random, 2, 32), draw(random, 16, 32), draw(random, 16)
    for wrong in (
        (x, weight.bfloat16(), None),
        (x, weight[:, :16].contiguous(), None),
        (x, weight, bias[:8]),
        (x, weight, bias.float()),
    ):
        with pytest.raises(RuntimeError):
            linear(*wrong)
    with pytest.raises(RuntimeError):
        gated_linear(x, weight[:15], None)


def test_launches_fit_their_class() -> None:
    for m in (1, 2, 3, 4, 5, 16, 17, 33, 64):
        for n, k in [(6144, 4096), (1024, 2048), (151936, 1024), (1536, 576)]:
            chosen = config(m, n, k)
            if chosen is None:
                assert (m, n, k) in TUNED or m > SKINNY_ROWS or (m > MATVEC_ROWS and n * k < SMALL)
                continue
            assert m <= chosen.rows
            assert chosen.groups in (1, chosen.warps)
            assert (chosen.rows > MATVEC_ROWS) or (chosen.split == chosen.groups == 1)
    assert config(256, 6144, 4096) is None
    assert config(1, 6144, 100) is None
