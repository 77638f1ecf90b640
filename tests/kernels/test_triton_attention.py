"""The Triton attention kernels under Triton's interpreter, against float64; memory of no row is NaN."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from octavo.attention import AttnSpec, Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import reference
from tests.support.paged import Paged, expected, paged

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run in tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from octavo.attention import cuda
from octavo.attention.cuda import CudaAttention
from octavo.kernels.cuda import attention_prefill
from octavo.kernels.cuda.attention_decode import DecodeConfig, decode
from octavo.kernels.cuda.attention_prefill import PrefillConfig, prefill, tiles

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits", "fused", "window"),
    [(4, 1, 1, False, None), (6, 2, 4, False, 21), (7, 1, 4, True, None), (2, 2, 4, True, 21), (4, 2, 3, False, None)],
)
def test_decode(heads: int, kv_heads: int, splits: int, fused: bool, window: int | None) -> None:
    lens = [1, 0, 37, 150, 64]
    cache = paged(lens, kv_heads, 16, dtype=torch.float32, seed=heads, window=window)
    q = torch.randn(5, heads, 16)
    out = torch.full_like(q, float("nan"))
    arrivals = torch.zeros(16, dtype=torch.int32)
    launch = DecodeConfig(32, 4, 2, splits, fused)
    decode(
        q, cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, out, launch,
        scale=0.3, window=window, arrivals=arrivals,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected(q, cache, [1] * 5, 0.3), rtol=0, atol=2e-6)
    assert not arrivals.any()


@pytest.mark.parametrize("heads_first", [False, True])
def test_decode_of_half_floats_strided_queries_and_plain_tables(heads_first: bool) -> None:
    cache = paged([70, 5], 2, 16, dtype=torch.float16, heads_first=heads_first)
    q = torch.randn(2, 9, 16).to(torch.float16)[:, :4]
    out = torch.full((2, 4, 16), float("nan"), dtype=torch.float16)
    table = cache.table[cache.rows]
    decode(
        q, cache.k, cache.v, table, None, cache.seq_lens, out, DecodeConfig(16, 4, 2, 4, False), scale=0.25
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected(q, cache, [1, 1], 0.25), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "dtype"),
    [
        (4, 1, None, torch.float32),
        (6, 2, None, torch.float16),
        (3, 3, 5, torch.float32),
        (6, 2, 40, torch.float32),
        (4, 1, 21, torch.float16),
    ],
)
def test_prefill(heads: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> None:
    queries, cached = [1, 7, 25, 20], [20, 0, 25, 16]
    lens = [q + c for q, c in zip(queries, cached, strict=True)]
    cache = paged(lens, kv_heads, 16, dtype=dtype, window=window, queries=queries, seed=heads)
    q = torch.randn(sum(queries), heads, 16).to(dtype)
    out = torch.full_like(q, float("nan"))
    rows = np.arange(1, 4)
    launch = PrefillConfig(16, 16, 4, 2)
    counts = np.array(queries, np.int32)
    listed = tiles(rows, counts[1:], np.array(lens[1:], np.int32), 16 // (heads // kv_heads))
    starts = torch.tensor(np.concatenate(([0], np.cumsum(counts))), dtype=torch.int32)
    prefill(
        q, cache.k, cache.v, cache.table, cache.rows, starts, cache.seq_lens, torch.from_numpy(listed), out, launch,
        scale=0.3, window=window,
    )  # fmt: skip
    truth = expected(q, cache, queries, 0.3)
    torch.testing.assert_close(out[1:].double(), truth[1:], rtol=0, atol=TOLERANCE[dtype])
    assert out[0].isnan().all()


def test_programs_cover_each_token_once_and_begin_with_the_longest_walk() -> None:
    q_lens, kv_lens = np.array([5, 9], np.int32), np.array([105, 9], np.int32)
    listed = tiles(np.array([2, 3]), q_lens, kv_lens, 4)
    assert listed.tolist() == [[2, 4], [2, 0], [3, 8], [3, 4], [3, 0]]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("whole_tables", [False, True])
def test_backend_runs_mixed_steps(window: int | None, whole_tables: bool) -> None:
    queries = [1, 1, 5, 20]
    cache = paged([40, 3, 30, 20], 2, 16, dtype=torch.float32, window=window, queries=queries)
    group, spec = KVGroup(0, (0,), window), AttnSpec(4, 2, 16, 0.3, window, 16)
    backend = CudaAttention(reference, (spec,), torch.device("cpu"), torch.float32)
    assert backend.supports(spec) is None
    batch = batch_of(cache, queries, whole_tables)
    q = torch.randn(sum(queries), 4, 16)
    out = backend.run(q, batch.kv[0], backend.plan(batch, group), spec)
    torch.testing.assert_close(out.double(), expected(q, cache, queries, 0.3).flatten(1), rtol=0, atol=2e-6)


def test_hoppers_kernel_is_planned_unless_a_window_hides_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load_hopper", lambda *_: SimpleNamespace(tokens=32))
    spec = AttnSpec(32, 8, 128, 0.1, None, 16)
    backend = CudaAttention(reference, (spec,), torch.device("cpu"), torch.bfloat16)
    batch = batch_of(paged([9, 100, 7], 1, 16, dtype=torch.float32), [1, 70, 7], False)
    for window in (None, 100):
        plan = backend.plan(batch, KVGroup(0, (0,), window)).prefill
        assert plan is not None
        assert plan.launch is None
        assert plan.programs.tolist() == [[1, 64], [1, 32], [1, 0], [2, 0]]
    plan = backend.plan(batch, KVGroup(0, (0,), 99)).prefill
    assert plan is not None
    assert plan.launch == attention_prefill.config(70, 4, 128)


def batch_of(cache: Paged, queries: list[int], whole_tables: bool) -> Batch:
    counts = np.array(queries, np.int32)
    tokens = torch.zeros(int(counts.sum()), dtype=torch.int64)
    starts = torch.tensor(np.concatenate(([0], np.cumsum(counts))), dtype=torch.int32)
    return Batch(
        tokens=tokens,
        positions=tokens,
        row_of=tokens,
        q_start=starts,
        seq_lens=cache.seq_lens,
        slots=(tokens,),
        tables=(cache.table[cache.rows],),
        logits_at=tokens,
        num_decode=queries.count(1),
        max_q=max(queries),
        max_kv=int(cache.seq_lens.max()),
        q_lens=counts,
        kv_lens=cache.seq_lens.numpy(),
        kv=(KVCache(cache.k, cache.v),),
        rows=cache.rows if whole_tables else None,
        row_tables=(cache.table,) if whole_tables else None,
    )
