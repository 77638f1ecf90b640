"""Norms, rope, SiLU-mul, log-probabilities and batch preparation under Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, torch.full_like(tensor, 3)), -1)[..., 0]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_strided_side_operands(draw: Draw) -> None:
    tokens, table = draw.ints(50, 4), draw(50, 24)
    assert torch.equal(cuda.embedding(spread(tokens), table), table[tokens])
    x, residual, weight = draw(3, 64), draw(3, 64), draw(64)
    same(cuda.rms_norm(x, spread(weight), 1e-5), reference.rms_norm(x, weight, 1e-5))
    same(cuda.add_rms_norm(x, residual, spread(weight), 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5))
    same(cuda.top_logprobs(x, spread(tokens[:3]), 2), reference.top_logprobs(x.float(), tokens[:3], 2))


def test_strided_positions() -> None:
    positions, frequencies = torch.tensor([3, 900, 17]), torch.rand(3, 8)
    for given in (frequencies[0], frequencies, frequencies[:1]):
        same(cuda.rotation(spread(positions), given, 1.0), reference.rotation(positions, given, 1.0))
        same(cuda.rotation(positions, given, 1.0), reference.rotation(positions, given, 1.0))


@pytest.mark.parametrize("what", ["slots", "one angle", "cut angles", "norms"])
def test_rope_with_other_side_operands(draw: Draw, what: str) -> None:
    qkv, slots, angles = draw(4, 8 * 16), draw.places(32, 4), torch.rand(4, 1, 8)
    turn = (torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1))
    norms = (draw(16), draw(16), 1e-6)
    if what == "one angle":
        turn = (turn[0][:1], turn[1][:1])
    plain, places = (turn, norms), slots
    if what == "slots":
        slots = spread(slots)
    elif what == "one angle":
        turn = (turn[0].expand(4, 1, 16), turn[1].expand(4, 1, 16))
    elif what == "cut angles":
        turn = (spread(turn[0]), spread(turn[1]))
    else:
        norms = (spread(norms[0]), norms[1], 1e-6)
    caches = [draw(2, 16, 2, 16).zero_() for _ in range(6)]
    expected = reference.rope_norm_write_kv(qkv, 4, *plain, caches[0], caches[1], places)
    same(cuda.rope_norm_write_kv(qkv, 4, turn, norms, caches[2], caches[3], slots), expected)
    same(cuda.rope_norm_write_kv(qkv, 4, *plain, caches[4], caches[5], places), expected)
    same(caches[2:4], caches[:2])
    same(caches[4:], caches[:2])


def test_strided_row_state() -> None:
    count = torch.tensor([4, 7, 2, 0])
    rows, last = torch.tensor([2, 0]), torch.tensor([5, 6, 7, 0])
    tables = torch.arange(4 * 3, dtype=torch.int32).view(1, 4, 3)
    names = ("tokens", "positions", "next_positions", "seq_lens", "slots")

    def prepared(kernels: Any, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = [torch.zeros(2, dtype=torch.int32 if name == "seq_lens" else torch.int64) for name in names]
        out[-1] = out[-1][None]
        given, kept = [change(t) for t in out], change(count)
        kernels.prepare_decode(change(rows), change(last), kept, tables, 4, **dict(zip(names, given, strict=True)))
        kernels.apply_diffs(tables.clone(), rows, tables[0, 0, :2], kept, change(rows), change(last[:2]))
        return [*given, kept]

    same(prepared(cuda, spread), prepared(reference, torch.clone))


def test_shapes_without_a_kernel(draw: Draw) -> None:
    """What the reference takes is computed, what it refuses raises."""
    x = draw(2, 3, 64)
    same(cuda.log_softmax(x), x.log_softmax(-1))
    same(cuda.log_softmax(x[0, 0]), x[0, 0].log_softmax(-1))
    with pytest.raises(RuntimeError):
        cuda.silu_mul(x[0, :, :63])
    for call in (
        lambda: cuda.rms_norm(x, draw(32), 1e-5),
        lambda: cuda.add_rms_norm(x[0], x[0], draw(32), 1e-5),
        lambda: cuda.embedding(torch.zeros(2, 2, dtype=torch.int64), x[0]),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()


def test_all_reference_functions_are_there() -> None:
    assert set(reference.__all__) <= set(cuda.__all__)
