"""The sampling kernel under Triton's interpreter: the reference's tokens exactly."""

from __future__ import annotations

import math

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run in tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from octavo.kernels import cuda, reference
from octavo.kernels.cuda import sampling
from tests.support.kernel_checks import agreement, knobs, mixed_knobs, poisoned

VOCAB = 450

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")
"""numpy warns where IEEE arithmetic gives infinity or NaN."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(sampling, "CHUNK", 128)
    monkeypatch.setattr(sampling, "PIECE", 16)
    monkeypatch.setattr(sampling, "FILTER_BLOCK", 256)
    monkeypatch.setattr(sampling, "SEARCH_BLOCK", 128)


@pytest.mark.parametrize("spread", [0.01, 2.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_filters(spread: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(14, VOCAB) * spread).to(dtype)
    assert agreement(cuda, logits, mixed_knobs(14, VOCAB, "cpu")) == 1


def test_equal_and_forbidden_logits() -> None:
    logits = (torch.randn(10, VOCAB) * 4).round()
    logits[::2, 30:] = -math.inf
    logits[4:8] = 1.5
    assert agreement(cuda, logits, mixed_knobs(10, VOCAB, "cpu", seed=1)) == 1


def test_sets_beyond_the_scratch_search_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CAPACITY", 16)
    logits = torch.randn(6, VOCAB)
    logits[3:] = 0.25
    given = knobs(6, "cpu", top_k=[3, 40, 300, 3, 40, 300], top_p=[1.0, 0.5, 0.9, 0.5, 1.0, 1.0])
    assert agreement(cuda, logits, given) == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
def test_tiny_temperatures(temperature: float) -> None:
    logits = torch.randn(3, VOCAB) * 20
    for more in ({}, {"top_k": 9, "top_p": 0.5}):
        found = cuda.sample(logits, **knobs(3, "cpu", temperature=temperature, **more))
        assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_logits_give_an_id_in_range(bad: float) -> None:
    logits = torch.randn(3, 400)
    logits[0], logits[1, 5] = bad, bad
    for more in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        given = knobs(3, "cpu", **more)
        found = cuda.sample(logits, **given)
        assert bool(((found >= 0) & (found < 400)).all())
        assert found[2] == reference.sample(logits, **given)[2]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [17, 500, 999]] = 1.0
    logits[1, [998, 999]] = 2.0
    assert cuda.sample(logits, **knobs(3, "cpu", temperature=0.0)).tolist() == [17, 998, 0]


@pytest.mark.parametrize("filtered", [False, True])
def test_rows_of_tables(filtered: bool) -> None:
    """Parameters through row indices, positions with an offset, the token into the row state."""
    logits, rows = torch.randn(4, VOCAB + 20)[:, :VOCAB], torch.tensor([5, 2, 8, 8])
    more = {"top_k": [3, 0, 0] * 3, "top_p": [1.0, 0.7, 1.0] * 3} if filtered else {}
    tables = knobs(9, "cpu", temperature=[0.5, 1.0, 0.0] * 3, **more)
    position = torch.tensor([4, 7, 0, 0])
    expected = reference.sample(
        logits.contiguous(), **{n: t[rows] for n, t in tables.items() if n != "position"}, position=position + 1
    )
    last = torch.full((9,), -7)
    out = torch.full((4,), -1)
    with poisoned():
        given = {n: t for n, t in tables.items() if n != "position"}
        cuda.sample_rows(
            logits, rows, **given, position=position, offset=1, filtered=filtered, tokens=out, last_token=last
        )
    assert out.tolist() == expected.tolist()
    assert last[rows[:2]].tolist() == expected[:2].tolist()
    assert int(last[8]) in expected[2:].tolist()
    assert int((last == -7).sum()) == 6


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed", "position"])
def test_strided_parameters(name: str) -> None:
    logits = torch.randn(6, VOCAB)
    given = mixed_knobs(6, VOCAB, "cpu")
    expected = reference.sample(logits, **given)
    given[name] = torch.stack((given[name], given[name] + 1), 1)[:, 0]
    assert torch.equal(cuda.sample(logits, **given), expected)


def test_no_rows() -> None:
    assert cuda.sample(torch.zeros(0, 9), **knobs(0, "cpu", seed=[], position=[])).shape == (0,)


def test_float64_goes_to_the_reference() -> None:
    logits = torch.full((2, 50), 1.0, dtype=torch.float64)
    logits[:, 30] += 1e-12
    given = knobs(2, "cpu", temperature=[0.0, 1e-15])
    assert cuda.sample(logits, **given).tolist() == [30, 30]
    last, out = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    cuda.sample_rows(logits, torch.tensor([1, 0]), *given.values(), tokens=out, last_token=last)
    assert out.tolist() == last.tolist() == [30, 30]
