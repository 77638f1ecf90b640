"""The sampling kernel on a GPU against the reference on the CPU, eagerly and in a graph."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from octavo.kernels import cuda, reference
from octavo.kernels.cuda import launch
from tests.support.kernel_checks import agreement, knobs, mixed_knobs, poisoned

pytestmark = pytest.mark.usefixtures("dependent")


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("vocab", [1000, 5003, 128_256, 151_936])
@pytest.mark.parametrize("spread", [0.01, 2.0, 10.0])
def test_mixed_filters(vocab: int, spread: float, dtype: torch.dtype, random: torch.Generator) -> None:
    """The logarithms differ in their last bits, which can turn a draw or a border once in some ten thousand rows."""
    rows = 24
    logits = (torch.randn(rows, vocab, generator=random) * spread).to("cuda", dtype)
    assert agreement(cuda, logits, mixed_knobs(rows, vocab, "cuda", seed=vocab)) >= 1 - 1.5 / rows


def test_temperature_only(dtype: torch.dtype, random: torch.Generator) -> None:
    rows, vocab = 256, 32_000
    logits = (torch.randn(rows, vocab, generator=random) * 3).to("cuda", dtype)
    assert agreement(cuda, logits, knobs(rows, "cuda", temperature=0.6)) >= 1 - 1.5 / rows


def test_equal_and_forbidden_logits(random: torch.Generator) -> None:
    logits = (torch.randn(64, 20_000, generator=random) * 4).round().cuda()
    logits[::2, 300:] = -math.inf
    logits[8:16] = 1.5
    assert agreement(cuda, logits, mixed_knobs(64, 20_000, "cuda", seed=1)) >= 1 - 1.5 / 64


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 150_000, device="cuda")
    logits[0, [1700, 50_000, 149_999]] = 1.0
    logits[1, [149_998, 149_999]] = 2.0
    assert cuda.sample(logits, **knobs(3, "cuda", temperature=0.0)).tolist() == [1700, 149_998, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "more",
    [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 5, "top_p": 0.5}],
    ids=str,
)
def test_unusable_logits_give_an_id_in_range(bad: float, more: dict[str, float], random: torch.Generator) -> None:
    logits = torch.randn(3, 20_001, generator=random).cuda()
    logits[0], logits[1, 5] = bad, bad
    given = knobs(3, "cuda", **more)
    found = cuda.sample(logits, **given)
    assert bool(((found >= 0) & (found < 20_001)).all())
    assert found[2].item() == reference.sample(logits[2:].cpu(), **{n: t[2:].cpu() for n, t in given.items()})[0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
def test_tiny_temperatures_are_greedy_in_effect(temperature: float, random: torch.Generator) -> None:
    logits = (torch.randn(4, 30_000, generator=random) * 20).cuda()
    for more in ({}, {"top_k": 9, "top_p": 0.5}):
        assert torch.equal(cuda.sample(logits, **knobs(4, "cuda", temperature=temperature, **more)), logits.argmax(-1))


def test_a_row_draws_the_same_in_any_batch(random: torch.Generator) -> None:
    logits = (torch.randn(40, 50_000, generator=random) * 2).cuda()
    given = mixed_knobs(40, 50_000, "cuda", seed=3)
    together = cuda.sample(logits, **given)
    for row in range(40):
        alone = cuda.sample(logits[row : row + 1], **{n: t[row : row + 1] for n, t in given.items()})
        assert alone.item() == together[row].item()


def test_with_and_without_filters_where_there_are_none(random: torch.Generator) -> None:
    logits = torch.randn(30, 50_000, generator=random).cuda()
    given = knobs(30, "cuda", temperature=[0.0, 0.5, 1.0] * 10)
    plain = cuda.sample_rows(logits, None, *given.values(), filtered=False)
    assert torch.equal(cuda.sample(logits, **given), plain)
    with launch.without_pdl():
        assert torch.equal(cuda.sample(logits, **given), plain)


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.8}], ids=str
)
def test_distribution(more: dict[str, float]) -> None:
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(5))]
    n = 40_000
    given = knobs(n, "cuda", seed=list(range(n)), position=5, **more)
    counts = torch.bincount(cuda.sample(logits.cuda().expand(n, -1).contiguous(), **given), minlength=12).cpu().double()
    weight = logits.double().softmax(-1)
    weight[weight < more.get("min_p", 0) * weight.max()] = 0
    if "top_k" in more:
        weight[weight < weight.sort().values[-int(more["top_k"])]] = 0
    order = weight.argsort(descending=True)
    before = weight[order].cumsum(0) - weight[order]
    weight[order[before >= more.get("top_p", 1.0) * weight.sum()]] = 0
    kept = weight > 0
    expected = (weight / weight.sum())[kept] * n
    assert counts[~kept].sum() == 0
    chi2, free = float(((counts[kept] - expected) ** 2 / expected).sum()), int(kept.sum()) - 1
    assert chi2 < free + 5 * math.sqrt(2 * free)


def test_a_graph_follows_the_tables(random: torch.Generator) -> None:
    """Rows, parameters and positions are read from memory at every replay."""
    size, vocab = 9, 40_000
    logits = torch.randn(size, vocab, generator=random).cuda()
    tables = mixed_knobs(33, vocab, "cuda", seed=2)
    position = torch.zeros(size, dtype=torch.int64, device="cuda")
    temperature, top_k, top_p, min_p, seed, _ = tables.values()
    rows = torch.zeros(size, dtype=torch.int64, device="cuda")
    tokens, last = torch.empty_like(rows), torch.zeros(33, dtype=torch.int64, device="cuda")

    def draw() -> None:
        cuda.sample_rows(
            logits,
            rows,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            position,
            offset=1,
            tokens=tokens,
            last_token=last,
        )

    draw()
    graph = torch.cuda.CUDAGraph()
    with poisoned(), torch.cuda.graph(graph):
        draw()
    for step in range(4):
        rows.copy_(torch.randperm(32, generator=random)[:size])
        position.fill_(step * 17)
        tables["temperature"].copy_(tables["temperature"].roll(1))
        logits.copy_(torch.randn(size, vocab, generator=random))
        tokens.fill_(-1)
        graph.replay()
        gathered = {n: t[rows] for n, t in tables.items()} | {"position": position + 1}
        expected = cuda.sample(logits, **gathered)
        assert torch.equal(tokens, expected)
        assert torch.equal(last[rows], expected)
