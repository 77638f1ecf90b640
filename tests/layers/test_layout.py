"""Slice arithmetic of layouts: ranks together hold what one rank holds, and Linears of parts multiply alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from octavo.attention.reference import ReferenceAttention
from octavo.core.errors import ConfigError
from octavo.kernels import load
from octavo.layers import Build, Linear
from octavo.parallel import Column, Heads, Layout, Replicated, Row, Slice


def reads(layout: Layout, part: str, in_features: int, size: int) -> list[Slice]:
    return [layout.read(part, in_features, rank, size) for rank in range(size)]


def test_column_splits_outputs_of_each_part() -> None:
    layout = Column({"gate": 12, "up": 8})
    assert reads(layout, "gate", 5, 4) == [Slice((3 * r, 3 * r + 3), (0, 5)) for r in range(4)]
    assert reads(layout, "up", 5, 4) == [Slice((2 * r, 2 * r + 2), (0, 5)) for r in range(4)]


def test_row_splits_inputs_and_gives_partial_sums() -> None:
    assert reads(Row({"down": 6}), "down", 8, 2) == [Slice((0, 6), (0, 4)), Slice((0, 6), (4, 8))]
    assert Row({"down": 6}).partial
    assert not Column({"up": 6}).partial


def test_replicated_reads_everything() -> None:
    assert reads(Replicated({"head": 6}), "head", 8, 3) == [Slice((0, 6), (0, 8))] * 3


def test_heads_split_by_whole_heads() -> None:
    layout = Heads(q=8, kv=4, dim=2)
    assert layout.parts == {"q": 16, "k": 8, "v": 8}
    assert [s.out for s in reads(layout, "q", 3, 2)] == [(0, 8), (8, 16)]
    assert [s.out for s in reads(layout, "k", 3, 2)] == [(0, 4), (4, 8)]


def test_more_ranks_than_kv_heads_share_them() -> None:
    layout = Heads(q=8, kv=2, dim=4)
    assert [s.out for s in reads(layout, "v", 3, 8)] == [(0, 4)] * 4 + [(4, 8)] * 4
    assert [s.out for s in reads(layout, "q", 3, 8)] == [(4 * r, 4 * r + 4) for r in range(8)]


@pytest.mark.parametrize(
    ("layout", "part", "size"),
    [
        (Column({"up": 10}), "up", 4),
        (Row({"down": 3}), "down", 4),
        (Heads(6, 3, 2), "q", 4),
        (Heads(12, 3, 2), "k", 2),
        (Heads(8, 3, 2), "k", 4),
    ],
)
def test_what_does_not_divide_is_refused(layout: Layout, part: str, size: int) -> None:
    with pytest.raises(ConfigError, match="tensor-parallel-size"):
        layout.read(part, 10, 0, size)


def test_granularity_divides_or_refuses() -> None:
    cut = Slice((128, 256), (64, 192))
    assert cut.index() == (slice(128, 256), slice(64, 192))
    assert cut.index((128, 32)) == (slice(1, 2), slice(2, 6))
    with pytest.raises(ConfigError, match="groups 128"):
        cut.index((1, 128))


@dataclass(frozen=True)
class FakeRank:
    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        return None

    def all_gather(self, x: Tensor) -> Tensor:
        return x


def linear(layout: Layout, rank: int, size: int, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> Linear:
    kernels = load("cpu")
    backend = ReferenceAttention(kernels)
    build = Build(torch.float64, torch.device("cpu"), kernels, backend, (), (), FakeRank(rank, size))
    made = Linear(next(iter(weights.values())).shape[1], layout, build, bias=True)
    for (part, key), put in made.slots().items():
        put(weights[part] if key == "weight" else biases[part])
    made.finish()
    return made


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", [Column({"gate": 8, "up": 4}), Row({"down": 6}), Heads(8, 4, 2), Heads(4, 2, 2)])
def test_ranks_together_multiply_like_one(layout: Layout, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64)
    weights = {part: torch.randn(out, 8, dtype=torch.float64) for part, out in layout.parts.items()}
    biases = {part: torch.randn(out, dtype=torch.float64) for part, out in layout.parts.items()}
    expected = {part: x @ weights[part].T + biases[part] for part in layout.parts}
    total = torch.zeros_like(next(iter(expected.values())))
    for rank in range(size):
        part_reads = {part: layout.read(part, 8, rank, size) for part in layout.parts}
        start, stop = next(iter(part_reads.values())).in_
        y = linear(layout, rank, size, weights, biases)(x[:, start:stop])
        if layout.partial:
            total += y
            continue
        wanted = [expected[part][:, slice(*read.out)] for part, read in part_reads.items()]
        torch.testing.assert_close(y, torch.cat(wanted, 1))
    if layout.partial:
        torch.testing.assert_close(total, next(iter(expected.values())))
