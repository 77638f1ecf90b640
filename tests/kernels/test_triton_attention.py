"""The Triton attention kernels under Triton's interpreter, against float64; memory of no row is NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from octavo.attention import AttnSpec, Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import Kernels, reference
from tests.support.paged import Paged, expected, paged
from tests.support.qkv import newest, unwritten

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run in tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from octavo.attention import cuda
from octavo.attention.cuda import CudaAttention
from octavo.kernels.cuda import attention_prefill, rope_norm_write_kv, rotation
from octavo.kernels.cuda.attention_decode import DecodeConfig, NewTokens, decode
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


@pytest.mark.parametrize("launch", [DecodeConfig(32, 4, 2, 1, True), DecodeConfig(16, 4, 2, 4, False)])
def test_decode_starts_rows_in_any_order(launch: DecodeConfig) -> None:
    cache = paged([90, 3, 150, 17], 2, 16, dtype=torch.float32)
    q, order = torch.randn(4, 4, 16), torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    out = torch.full_like(q, float("nan"))
    decode(q, cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, out, launch, scale=0.3, order=order)
    torch.testing.assert_close(out.double(), expected(q, cache, [1] * 4, 0.3), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "width", "norms", "dtype", "splits", "merged", "window", "ordered", "heads_first"),
    [
        (2, 2, 64, 64, False, torch.float32, 1, False, None, False, False),
        (4, 4, 32, 16, True, torch.float16, 3, True, None, True, True),
        (4, 1, 128, 128, True, torch.float32, 4, True, 21, True, False),
        (8, 2, 64, 16, False, torch.float16, 4, False, 40, False, True),
        (8, 1, 64, 64, True, torch.float16, 4, False, None, True, False),
        (16, 2, 64, 32, False, torch.float32, 3, True, None, False, True),
        (16, 1, 64, 64, True, torch.float16, 2, True, 40, True, False),
        (3, 1, 256, 256, True, torch.float16, 1, False, 21, True, True),
    ],
)
def test_decode_of_the_qkv_product_equals_one_after_another(
    heads: int,
    kv_heads: int,
    dim: int,
    width: int,
    norms: bool,
    dtype: torch.dtype,
    splits: int,
    merged: bool,
    window: int | None,
    ordered: bool,
    heads_first: bool,
) -> None:
    """Bit for bit, in out and all of the cache; the last two rows are padding, the second has no tokens."""
    torch.manual_seed(heads * dim)
    lens = [110, 0, 33, 1, 16, 1, 1]
    cache = paged(lens, kv_heads, dim, dtype=dtype, window=window, heads_first=heads_first)
    cache.table[cache.rows[-2:]] = 0
    slots = newest(cache)
    slots[1] = 1
    qkv = torch.randn(len(lens), (heads + 2 * kv_heads) * dim + 16).to(dtype)[:, :-16]
    qkv[-1] = qkv[-2]
    turn = rotation((cache.seq_lens - 1).clamp_min(0).long(), torch.rand(width // 2), 1.25)
    weights = (torch.rand(2, dim) + 0.5).to(dtype)
    head_norms = (weights[0], weights[1], 1e-5) if norms else None
    arrivals = torch.zeros(len(lens) * kv_heads, dtype=torch.int32)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: NewTokens | None) -> torch.Tensor:
        return decode(
            q, k, v, cache.table, cache.rows, cache.seq_lens, torch.full((7, heads, dim), torch.nan).to(dtype),
            DecodeConfig(32, 4, 2, splits, merged), scale=dim**-0.5, window=window, arrivals=arrivals, new=new,
            order=torch.tensor([3, 0, 6, 1, 5, 2, 4], dtype=torch.int32) if ordered else None,
        )  # fmt: skip

    k, v = cache.k.clone(), cache.v.clone()
    for old in (k, v, cache.k, cache.v):
        old[slots // 16, slots % 16] = float("nan")
    assert k.stride() == cache.k.stride()
    truth = run(rope_norm_write_kv(qkv, heads, turn, head_norms, k, v, slots), k, v, None)
    out = run(qkv, cache.k, cache.v, NewTokens(slots, turn, head_norms))
    assert not out.isnan().any()
    assert not out[1].any()
    for found, same in ((out, truth), (cache.k, k), (cache.v, v)):
        torch.testing.assert_close(found, same, rtol=0, atol=0, equal_nan=True)
    assert not arrivals.any()


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
    truth = expected(q, cache, queries, 0.3).flatten(1)
    qkv, turn = unwritten(q, batch.kv[0], batch.slots[0])
    out = backend.attend(qkv, batch.kv[0], backend.plan(batch, group), spec, turn, None)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6)


@pytest.mark.parametrize("exact_turn", [False, True])
def test_backend_takes_one_launch_for_rows_of_one_token_where_it_can(exact_turn: bool) -> None:
    cache = paged([40, 3, 30], 2, 16, dtype=torch.float32)
    group, spec = KVGroup(0, (0,), None), AttnSpec(4, 2, 16, 0.3, None, 16)
    calls: list[str] = []

    def write(*args: Any) -> torch.Tensor:
        calls.append("write")
        return reference.rope_norm_write_kv(*args)

    kernels = cast("Kernels", SimpleNamespace(rope_norm_write_kv=write))
    backend = CudaAttention(kernels, (spec,), torch.device("cpu"), torch.float32)
    batch = batch_of(cache, [1, 1, 1], True)
    q = torch.randn(3, 4, 16)
    truth = expected(q, cache, [1, 1, 1], 0.3).flatten(1)
    qkv, (cos, sin) = unwritten(q, batch.kv[0], batch.slots[0])
    turn = (cos.double(), sin.double()) if exact_turn else (cos, sin)  # float64 is nothing that the kernels read
    out = backend.attend(qkv, batch.kv[0], backend.plan(batch, group), spec, turn, None)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6)
    assert calls == ["write"] * exact_turn


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
        slots=(newest(cache, queries),),
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
