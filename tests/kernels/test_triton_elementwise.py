"""Norms, rope, SiLU-mul, log-probabilities and batch preparation under Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run in tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from octavo.kernels import cuda, reference
from octavo.kernels.cuda import logprobs
from tests.support import kernel_checks as checks
from tests.support.kernel_checks import Draw

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def draw(request: pytest.FixtureRequest) -> Draw:
    return Draw("cpu", request.param)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 200)])
def test_norms(draw: Draw, rows: int, size: int) -> None:
    checks.check_norms(cuda, draw, rows, size)


def test_strided_rows(draw: Draw) -> None:
    checks.check_strided_rows(cuda, draw)


@pytest.mark.parametrize(("rows", "size"), [(1, 24), (2, 1030)])
def test_silu_mul(draw: Draw, rows: int, size: int) -> None:
    checks.check_silu_mul(cuda, draw, rows, size)


def test_embedding(draw: Draw) -> None:
    checks.check_embedding(cuda, draw, 4, 1100)


@pytest.mark.parametrize("per_token", [False, True])
def test_rotation(per_token: bool) -> None:
    checks.check_rotation(cuda, Draw("cpu", torch.float32), 3, 12, per_token)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "width", "norm", "swap"),
    [
        (4, 2, 16, 16, False, False),
        (6, 2, 20, 12, True, False),
        (3, 1, 32, 32, True, True),
        (8, 8, 128, 64, False, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_rope(draw: Draw, rows: int, heads: int, kv_heads: int, dim: int, width: int, norm: bool, swap: bool) -> None:
    checks.check_rope(cuda, draw, rows, heads, kv_heads, dim, width, norm, swap)


@pytest.mark.parametrize("k", [0, 1, 20])
def test_top_logprobs(draw: Draw, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 64)
    checks.check_top_logprobs(cuda, draw, 2, 200, k)


def test_log_softmax(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 64)
    checks.check_log_softmax(cuda, draw, 2, 300)


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (130, 2)])
def test_prepare_decode(size: int, groups: int) -> None:
    checks.check_prepare_decode(cuda, "cpu", size, groups)


@pytest.mark.parametrize(("blocks", "values"), [(0, 3), (200, 0), (5, 200)])
def test_apply_diffs(blocks: int, values: int) -> None:
    checks.check_diffs(cuda, "cpu", blocks, values)


def test_no_rows(draw: Draw) -> None:
    x, weight = draw(0, 32), draw(32)
    assert cuda.rms_norm(x, weight, 1e-6).shape == (0, 32)
    assert cuda.silu_mul(x).shape == (0, 16)
    assert cuda.log_softmax(x).shape == (0, 32)
    assert cuda.top_logprobs(x, torch.zeros(0, dtype=torch.int64), 2)[0].shape == (0, 3)


def test_float64_goes_to_the_reference() -> None:
    draw = Draw("cpu", torch.float64)
    x, weight = draw(2, 32), draw(32)
    assert torch.equal(cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert torch.equal(cuda.silu_mul(x), reference.silu_mul(x))
    assert torch.equal(cuda.log_softmax(x), x.log_softmax(-1))


def test_all_reference_functions_are_there() -> None:
    assert set(reference.__all__) <= set(cuda.__all__)
