"""The C attention against the reference in float64; all memory that a row does not own is NaN or infinite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.attention import AttentionBackend, AttnSpec, Batch, KVCache
from octavo.attention.cpu import CpuAttention
from octavo.attention.cpu import Meta as CpuMeta
from octavo.attention.reference import ReferenceAttention
from octavo.config.kv import KVGroup
from octavo.kernels import reference
from octavo.kernels.cpu import build
from tests.support.qkv import unwritten

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(build.available() is not None, reason="needs a C compiler"),
]

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1 / 64}


def make(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block: int, window: int | None, dtype: torch.dtype
) -> tuple[Batch, AttnSpec, KVGroup, Tensor]:
    """rows: (query tokens, tokens before them), those of one query token first."""
    generator = torch.Generator().manual_seed(sum(map(sum, rows)))
    counts, before = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    lens = counts + before
    needed = int((-(-lens // block)).sum())
    ids = (torch.randperm(needed, generator=generator) + 1).tolist()
    table = torch.zeros(len(rows), int(lens.max()) // block + 2, dtype=torch.int32)
    k, v = (torch.full((needed + 1, block, kv_heads, dim), float("nan")) for _ in range(2))
    k[0], v[0] = float("inf"), -float("inf")
    for row, length in enumerate(lens.tolist()):
        first = 0 if window is None else max(int(before[row]) - window + 1, 0)
        for i in range(-(-length // block)):
            table[row, i] = ids.pop() if (i + 1) * block > first else 0
            for p in range(max(first, i * block), min(length, (i + 1) * block)):
                k[table[row, i], p % block] = torch.randn(kv_heads, dim, generator=generator)
                v[table[row, i], p % block] = torch.randn(kv_heads, dim, generator=generator)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tokens = int(counts.sum())
    new = [(row, p) for row, (count, past) in enumerate(rows) for p in range(past, past + count)]
    slots = torch.tensor([int(table[row, p // block]) * block + p % block for row, p in new])
    batch = Batch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.cat([torch.arange(b, b + c) for c, b in rows]),
        row_of=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        q_start=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lens),
        slots=(slots,),
        tables=(table,),
        logits_at=torch.from_numpy(starts[1:].astype(np.int64) - 1),
        num_decode=int((counts == 1).sum()),
        max_q=int(counts.max()),
        max_kv=int(lens.max()),
        q_lens=counts,
        kv_lens=lens.astype(np.int32),
        kv=(KVCache(k.to(dtype), v.to(dtype)),),
    )
    q = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    return batch, AttnSpec(heads, kv_heads, dim, 0.3, window, block), KVGroup(0, (0,), window), q


def attend(backend: AttentionBackend, batch: Batch, spec: AttnSpec, group: KVGroup, q: Tensor) -> Tensor:
    cache = batch.kv[0]
    qkv, rotation = unwritten(q, cache, batch.slots[0])
    return backend.attend(qkv, cache, backend.plan(batch, group), spec, rotation, None)


def check(batch: Batch, spec: AttnSpec, group: KVGroup, q: Tensor) -> None:
    wide = KVCache(batch.kv[0].k.double(), batch.kv[0].v.double())
    expected = attend(ReferenceAttention(reference), replace(batch, kv=(wide,)), spec, group, q.double())
    backend = CpuAttention(reference, (spec,))
    assert isinstance(backend.plan(batch, group), CpuMeta)
    found = attend(backend, batch, spec, group, q)
    assert found.dtype == q.dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


BATCHES = {
    "one": [(1, 0)],
    "decode": [(1, 6), (1, 63), (1, 64), (1, 200), (1, 0)],
    "long decode": [(1, 511), (1, 512), (1, 1500), (1, 30)],
    "prompt": [(70, 0)],
    "chunks": [(3, 0), (20, 130), (2, 20)],
    "all": [(1, 11), (1, 600), (17, 0), (4, 9), (2, 31), (40, 70)],
}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("window", [None, 1, 30, 520])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_equals_reference(rows: list[tuple[int, int]], dtype: torch.dtype, window: int | None) -> None:
    check(*make(rows, 6, 2, 32, 16, window, dtype))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 10), (60, 1, 80), (5, 1, 256), (1, 1, 1)])
def test_heads_and_dimensions(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check(*make([(1, 20), (1, 0), (1, 530), (19, 3)], heads, kv_heads, dim, 4, None, dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    decode=st.lists(st.integers(0, 700), max_size=5),
    chunks=st.lists(st.tuples(st.integers(2, 40), st.integers(0, 90)), max_size=3),
    heads=st.sampled_from([(1, 1), (6, 2), (7, 1), (4, 4)]),
    dim=st.sampled_from([8, 12, 64]),
    block=st.sampled_from([1, 3, 16]),
    window=st.none() | st.integers(1, 600),
)
def test_any_batch(
    decode: list[int],
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block: int,
    window: int | None,
) -> None:
    rows = [(1, past) for past in decode] + chunks
    check(*make(rows or [(1, 5)], *heads, dim, block, window, torch.float32))


def test_the_rows_own_tables_may_stand_in_for_gathered_ones() -> None:
    batch, spec, group, q = make([(1, 9), (1, 40), (5, 3)], 4, 2, 16, 4, None, torch.float32)
    lines = torch.tensor([3, 0, 2])
    whole = torch.full((5, batch.tables[0].shape[1]), 10**6, dtype=torch.int32)
    whole[lines] = batch.tables[0]
    backend = CpuAttention(reference, (spec,))
    expected = attend(backend, batch, spec, group, q)
    moved = replace(batch, tables=(), rows=lines, row_tables=(whole,))
    assert torch.equal(attend(backend, moved, spec, group, q), expected)


def test_a_row_of_no_length_gives_zeros_and_a_row_does_not_see_its_neighbours() -> None:
    batch, spec, group, q = make([(1, 9), (1, 600)], 4, 2, 16, 4, None, torch.float32)
    backend = CpuAttention(reference, (spec,))
    both = attend(backend, batch, spec, group, q)
    empty = replace(batch, seq_lens=torch.tensor([0, 601], dtype=torch.int32))
    found = attend(backend, empty, spec, group, q)
    assert not found[0].any()
    assert torch.equal(found[1], both[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_go_to_the_reference(dtype: torch.dtype) -> None:
    batch, spec, group, q = make([(1, 9), (6, 0)], 4, 2, 16, 4, None, torch.float32)
    cache = KVCache(batch.kv[0].k.to(dtype), batch.kv[0].v.to(dtype))
    batch = replace(batch, kv=(cache,))
    fast, exact = CpuAttention(reference, (spec,)), ReferenceAttention(reference)
    expected = attend(exact, batch, spec, group, q.to(dtype))
    assert torch.equal(attend(fast, batch, spec, group, q.to(dtype)), expected)
