"""Attention backends against a loop over tokens in float64.

Whatever memory holds beside a row's earlier, visible tokens is NaN, and infinity in some places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.attention import AttnSpec, Batch, KVCache, load_backend
from octavo.config.kv import KVGroup
from octavo.core.errors import UnsupportedModel
from octavo.kernels import load
from tests.support.qkv import unwritten

BLOCK, DIM = 4, 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}


@dataclass
class Case:
    batch: Batch
    spec: AttnSpec
    group: KVGroup
    q: Tensor
    expected: Tensor

    def run(self, batch: Batch | None = None) -> Tensor:
        batch = batch or self.batch
        backend, cache = load_backend(load("cpu"), (self.spec,)), batch.kv[0]
        meta = backend.plan(batch, self.group)
        qkv, rotation = unwritten(self.q, cache, batch.slots[0])
        return backend.attend(qkv, cache, meta, self.spec, rotation, None)


def make(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
    slack: int = 0,
) -> Case:
    """rows: (query tokens, tokens before them); `slack`: how far the host's bounds lie above the true lengths."""
    generator = torch.Generator().manual_seed(len(rows))
    spec = AttnSpec(*heads, DIM, 0.3, window, BLOCK)
    counts, before = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    lens = counts + before
    needed = sum(-(-int(n) // BLOCK) for n in lens)
    ids = (torch.randperm(needed, generator=generator) + 1).tolist()
    table = torch.zeros(len(rows), int(lens.max() + slack) // BLOCK + 2, dtype=torch.int32)
    k, v = (torch.full((needed + 1, BLOCK, heads[1], DIM), float("nan"), dtype=dtype) for _ in range(2))
    k[0, 0], v[0, 1] = float("inf"), float("-inf")
    q = torch.randn(int(counts.sum()), heads[0], DIM, generator=generator, dtype=torch.float64).to(dtype)
    expected: list[Tensor] = []
    positions: list[int] = []
    slots: list[int] = []
    first = 0
    for row, (count, past) in enumerate(rows):
        visible_from = 0 if window is None else max(past - window + 1, 0)
        for i in range(-(-(count + past) // BLOCK)):
            block = ids.pop()
            table[row, i] = block if (i + 1) * BLOCK > visible_from else 0  # what the window left is given back
            width = min(BLOCK, count + past - i * BLOCK)
            for cache in (k, v):
                noise = torch.randn(width, heads[1], DIM, generator=generator, dtype=torch.float64)
                cache[block, :width] = noise.to(dtype)
        expected += [naive(q[first + t], k, v, table[row], past + t, spec) for t in range(count)]
        positions += range(past, past + count)
        slots += [int(table[row, p // BLOCK]) * BLOCK + p % BLOCK for p in range(past, past + count)]
        first += count
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    batch = Batch(
        tokens=torch.zeros(first, dtype=torch.int64),
        positions=torch.tensor(positions),
        row_of=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        q_start=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lens),
        slots=(torch.tensor(slots),),
        tables=(table,),
        logits_at=torch.from_numpy(starts[1:].astype(np.int64) - 1),
        num_decode=int((counts == 1).sum()),
        max_q=int(counts.max()),
        max_kv=int(lens.max()) + slack,
        q_lens=counts,
        kv_lens=(lens + slack).astype(np.int32),
        kv=(KVCache(k, v),),
    )
    return Case(batch, spec, KVGroup(0, (0,), window), q, torch.stack(expected).flatten(1))


def naive(q: Tensor, k: Tensor, v: Tensor, table: Tensor, position: int, spec: AttnSpec) -> Tensor:
    """q [heads, dim] at `position` -> [heads, dim]."""
    first = 0 if spec.window is None else max(position - spec.window + 1, 0)
    places = [(int(table[p // BLOCK]), p % BLOCK) for p in range(first, position + 1)]
    out = []
    for head in range(spec.num_heads):
        kv_head = head // (spec.num_heads // spec.num_kv_heads)
        keys = torch.stack([k[b, o, kv_head] for b, o in places]).double()
        values = torch.stack([v[b, o, kv_head] for b, o in places]).double()
        out.append((keys @ q[head].double() * spec.scale).softmax(0) @ values)
    return torch.stack(out)


BATCHES = {
    "one decode": [(1, 6)],
    "first token": [(1, 0)],
    "decodes of one class": [(1, 16), (1, 19), (1, 30)],
    "decodes of many classes": [(1, 0), (1, 40), (1, 3), (1, 41), (1, 9)],
    "prompt": [(9, 0)],
    "chunk": [(5, 7)],
    "chunks": [(3, 0), (6, 13), (2, 20)],
    "all": [(1, 11), (1, 2), (1, 37), (7, 0), (4, 9), (2, 31), (12, 8)],
}


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_equals_naive(rows: list[tuple[int, int]], window: int | None) -> None:
    case = make(rows, window=window)
    torch.testing.assert_close(case.run(), case.expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_heads_and_dtypes(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    case = make(BATCHES["all"], heads=heads, dtype=dtype)
    out = case.run()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), case.expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("slack", [1, 7])
def test_host_lengths_are_only_upper_bounds(slack: int, window: int | None) -> None:
    case = make(BATCHES["all"], window=window, slack=slack)
    torch.testing.assert_close(case.run(), case.expected, rtol=0, atol=1e-12)


def test_padding_rows_disturb_no_one() -> None:
    """A padding row: one token at position 0, a table of padding blocks, whose content is garbage."""
    case = make([(1, 9), (1, 4)])
    batch = case.batch
    zero = torch.zeros(1, dtype=torch.int64)
    padded = Batch(
        tokens=torch.cat((batch.tokens, zero)),
        positions=torch.cat((batch.positions, zero)),
        row_of=torch.cat((batch.row_of, zero + 2)),
        q_start=torch.cat((batch.q_start, batch.q_start[-1:] + 1)),
        seq_lens=torch.cat((batch.seq_lens, zero.int())),
        slots=(torch.cat((batch.slots[0], zero)),),
        tables=(torch.cat((batch.tables[0], torch.zeros_like(batch.tables[0][:1]))),),
        logits_at=batch.logits_at,
        num_decode=3,
        max_q=1,
        max_kv=10,
        q_lens=np.ones(3, np.int32),
        kv_lens=np.array([10, 5, 1], np.int32),
        kv=batch.kv,
    )
    case.q = torch.cat((case.q, case.q[:1]))
    torch.testing.assert_close(case.run(padded)[:2], case.expected, rtol=0, atol=1e-12)


def test_gathers_no_more_than_the_window() -> None:
    """A window of 3 over 400 tokens: what lies behind has no block any more and is not even looked up."""
    case = make([(1, 400), (5, 396)], window=3)
    case.batch.tables[0][:, :90] = 10**6  # an index that would fail
    torch.testing.assert_close(case.run(), case.expected, rtol=0, atol=1e-12)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="5 query heads"):
        load_backend(load("cpu"), (AttnSpec(5, 2, DIM, 1.0, None, BLOCK),))
