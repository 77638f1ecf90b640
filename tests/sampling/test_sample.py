"""`sample` against exact probabilities and a naive implementation of the filters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels import reference_sampling
from octavo.kernels.reference_sampling import gumbel, sample


def draw(
    logits: Tensor,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 3,
    position: Any = 0,
) -> Tensor:
    """`sample` with numbers in place of tensors where all rows share them."""

    def full(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(len(logits)).clone()

    f, i = torch.float32, torch.int64
    return sample(
        logits,
        full(temperature, f),
        full(top_k, torch.int32),
        full(top_p, f),
        full(min_p, f),
        full(seed, i),
        full(position, i),
    )


def naive_kept(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], float]:
    """Token ids that the filters keep, by plain counting; and how far top_p is from deciding otherwise."""
    highest = max(logits)
    weight = [math.exp((x - highest) / temperature) for x in logits]
    kept = [i for i, w in enumerate(weight) if w > 0 and w >= min_p * (1 - 1e-12)]
    if top_k > 0:
        kept = [i for i in kept if sum(logits[j] > logits[i] for j in kept) < top_k]
    if top_p < 1:
        total = math.fsum(weight[i] for i in kept)
        before = {i: math.fsum(weight[j] for j in kept if logits[j] > logits[i]) / total for i in kept}
        return [i for i in kept if before[i] < top_p], min(abs(share - top_p) for share in before.values())
    return kept, 1.0


def naive_draw(logits: Tensor, kept: list[int], temperature: float, seed: int, position: int) -> int:
    z = (logits - logits.max()) / torch.tensor(temperature, dtype=torch.float32).to(logits.dtype)
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.arange(len(logits)))[0]
    scores = z + noise
    return max(kept, key=lambda i: (float(scores[i]), -i))


GRID = st.integers(-12, 12).map(lambda n: n / 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(GRID | st.just(-math.inf), min_size=2, max_size=30),
    st.sampled_from([0.25, 0.7, 1.0, 2.5]),
    st.integers(-1, 32),
    st.floats(1 / 128, 1.0, width=32),
    st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(512, 4096), (2, 5), (1,)]),
)
def test_filters_match_naive(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype, widths: Any
) -> None:
    assume(max(logits) > -math.inf)
    exact = float(torch.tensor(temperature, dtype=torch.float32))
    floor = float(torch.tensor(min_p, dtype=torch.float32))
    highest = max(logits)
    assume(
        all(x == -math.inf or abs(math.exp((x - highest) / exact) - floor) > 1e-6 for x in logits) or min_p in (0, 1)
    )
    kept, margin = naive_kept(logits, exact, top_k, top_p, floor)
    assume(margin > 1e-6)
    rows = torch.tensor([logits] * 8, dtype=dtype)
    before = rows.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_sampling, "_WIDTHS", widths)
        got = draw(rows, temperature, top_k, top_p, min_p, position=range(8))
    assert got.tolist() == [naive_draw(rows[0], kept, temperature, 3, i) for i in range(8)]
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "spread"),
    [
        (0, 0.9, 0.0, 3.0),
        (0, 0.9, 0.0, 0.01),
        (0, 0.3, 0.0, 8.0),
        (700, 1.0, 0.0, 1.0),
        (5000, 0.5, 0.0, 1.0),
        (40, 0.95, 0.0, 1.0),
        (0, 1.0, 0.001, 2.0),
        (0, 0.8, 0.02, 2.0),
        (900, 0.9, 0.001, 1.0),
    ],
)
def test_large_vocabulary(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    logits = torch.randn(1, 6000, dtype=torch.float64) * spread
    ordered = logits[0].sort(descending=True)
    weight = (ordered.values - ordered.values[0]).exp()
    if min_p:
        weight[weight < float(torch.tensor(min_p, dtype=torch.float32))] = 0
    if top_k:
        weight[top_k:] = 0
    before = (weight.cumsum(0) - weight) / weight.sum()
    keep = (weight > 0) & ((before < float(torch.tensor(top_p, dtype=torch.float32))) | (top_p == 1.0))
    kept = ordered.indices[keep].tolist()
    got = draw(logits.expand(20, -1), 1.0, top_k, top_p, min_p, position=range(20))
    assert got.tolist() == [naive_draw(logits[0], kept, 1.0, 3, i) for i in range(20)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (0.9, 8, 0.9, 0.02),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distribution(temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype) -> None:
    logits = torch.linspace(-2, 2, 12, dtype=dtype)[torch.randperm(12)]
    kept, _ = naive_kept(logits.tolist(), temperature, top_k, top_p, min_p)
    weight = torch.zeros(12, dtype=torch.float64)
    weight[kept] = ((logits[kept].double() - 2) / temperature).exp()
    n = 40_000
    got = draw(logits.expand(n, -1), temperature, top_k, top_p, min_p, seed=range(n), position=5)
    counts = torch.bincount(got, minlength=12).double()
    assert set(got.tolist()) == set(kept)
    expected = (weight / weight.sum())[kept] * n
    chi2, free = float(((counts[kept] - expected) ** 2 / expected).sum()), len(kept) - 1
    assert chi2 < free + 5 * math.sqrt(2 * free)


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(40, 3000) * 2
    knobs: dict[str, Any] = {
        "temperature": [0.0, 0.5, 1.0, 1.5, 1.0] * 8,
        "top_k": [0, 20, 0, 0, 0] * 8,
        "top_p": [1.0, 1.0, 0.9, 1.0, 0.99] * 8,
        "min_p": [0.0, 0.0, 0.0, 0.05, 0.0] * 8,
        "seed": list(range(40)),
        "position": list(range(100, 140)),
    }
    together = draw(logits, **knobs)
    order = torch.randperm(40)
    shuffled = draw(logits[order], **{name: [values[i] for i in order] for name, values in knobs.items()})
    assert torch.equal(shuffled, together[order])
    for row in range(40):
        alone = draw(logits[row : row + 1], **{name: values[row] for name, values in knobs.items()})
        assert alone.item() == together[row]


def test_seeds_and_positions_change_the_draw() -> None:
    flat = torch.zeros(200, 5000)
    assert len(set(draw(flat, seed=range(200)).tolist())) > 150
    assert len(set(draw(flat, position=range(200)).tolist())) > 150
    assert len(set(draw(flat).tolist())) == 1


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [17, 500, 999]] = 1.0
    logits[1, [998, 999]] = 2.0
    assert draw(logits, 0.0).tolist() == [17, 998, 0]


def test_float64_differences_below_float32_count() -> None:
    logits = torch.full((2, 50), 1.0, dtype=torch.float64)
    logits[:, 30] += 1e-12
    assert draw(logits, [0.0, 1e-15]).tolist() == [30, 30]


def test_tiny_temperatures_are_greedy_in_effect() -> None:
    logits = torch.randn(4, 300) * 20
    for temperature in (1e-6, 1e-30, 1e-40):
        assert torch.equal(draw(logits, temperature), logits.argmax(-1))
        assert torch.equal(draw(logits, temperature, top_k=10, top_p=0.5), logits.argmax(-1))


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 5, "min_p": 1.0}]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_logits_give_an_id_in_range(knobs: dict[str, Any], bad: float) -> None:
    logits = torch.randn(3, 2000)
    logits[0] = bad
    logits[1, 5] = bad
    got = draw(logits, **knobs).tolist()
    assert all(0 <= token < 2000 for token in got)
    assert got[2] == draw(logits[2:], **knobs).item()


def test_no_rows() -> None:
    assert draw(torch.empty(0, 10)).shape == (0,)


def test_random_numbers_and_sorting_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    for name in ("_draw", "_draw_narrow"):
        inner = getattr(reference_sampling, name)

        def spy(rows: Any, mixed: Tensor, name: str = name, inner: Any = inner) -> Tensor:
            seen.append((name, len(rows.logits)))
            result: Tensor = inner(rows, mixed)
            return result

        monkeypatch.setattr(reference_sampling, name, spy)
    logits = torch.randn(6, 50)
    draw(logits, 0.0, top_k=3)
    assert seen == []
    draw(logits, [0.0, 1.0, 1.0, 1.0, 0.0, 1.0], [5, 0, -1, 4, 0, 50], [1.0, 1.0, 1.0, 1.0, 0.5, 0.5])
    assert seen == [("_draw", 2), ("_draw_narrow", 2)]
