"""The attention kernels on a GPU against float64; all memory that is not a row's is NaN, outputs too beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.attention import AttnSpec, Batch, KVCache
from octavo.config.kv import KVGroup
from octavo.kernels import reference
from tests.support.paged import Paged, expected, paged

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from octavo.attention.cuda import CudaAttention
from octavo.kernels.cuda import attention_decode, attention_dense, attention_prefill
from octavo.kernels.cuda.attention_decode import DecodeConfig
from octavo.kernels.cuda.launch import without_pdl

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [(32, 8, 128), (16, 8, 128), (32, 8, 64), (28, 4, 128), (8, 8, 32), (9, 3, 64), (8, 1, 256)]


def check(out: Tensor, truth: Tensor) -> None:
    error = ((out.double() - truth).norm() / truth.norm()).item()
    assert error < 6e-3, f"relative error {error}"


def decode(
    q: Tensor, cache: Paged, launch: DecodeConfig, window: int | None, arrivals: Tensor, *, pdl: bool = False
) -> Tensor:
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device="cuda")
    return attention_decode.decode(
        q, cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, out, launch,
        scale=q.shape[-1] ** -0.5, window=window, arrivals=arrivals, pdl=pdl,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("window", [None, 200])
def test_decode(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None) -> None:
    lens = [1, 0, 16, 129, 777, 1500, 333]
    cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", window=window)
    q = torch.randn(len(lens), heads, dim, device="cuda").to(dtype)
    truth = expected(q, cache, [1] * len(lens), dim**-0.5)
    arrivals = torch.zeros(64, dtype=torch.int32, device="cuda")
    for splits in (1, 2, 8, 64):
        for fused in (False, True):
            for pdl in (False, True):
                out = decode(q, cache, DecodeConfig(64, 4, 3, splits, fused), window, arrivals, pdl=pdl)
                check(out, truth)
    chosen = attention_decode.config(len(lens), kv_heads, heads // kv_heads, dim, 1500)
    check(decode(q, cache, chosen, window, arrivals), truth)
    assert not arrivals.any()


@pytest.mark.parametrize("rows", [1, 8, 32, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES[:3])
def test_chosen_launches_replayed_in_a_graph_follow_growing_rows(
    rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    grown = torch.randint(1, 600, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
    cache = paged(grown, kv_heads, dim, dtype=BF16, device="cuda", heads_first=rows == 8)
    q = torch.randn(rows, heads, dim, device="cuda").to(BF16)
    lens = cache.seq_lens.clone()
    arrivals = torch.zeros(4096, dtype=torch.int32, device="cuda")
    chosen = attention_decode.config(rows, kv_heads, heads // kv_heads, dim, 4096)
    decode(q, cache, chosen, None, arrivals)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = decode(q, cache, chosen, None, arrivals)
        second = decode(q, cache, replace(chosen, fused=not chosen.fused), None, arrivals, pdl=True)
    for part in (3, 2, 1):
        cache.seq_lens.copy_((lens // part).clamp_min(1))
        first.fill_(float("nan"))
        second.fill_(float("nan"))
        graph.replay()
        truth = expected(q, cache, [1] * rows, dim**-0.5)
        check(first, truth)
        check(second, truth)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("window", [None, 100, 5000])
def test_paged_prefill(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None) -> None:
    queries, cached = [1, 2, 300, 65, 16, 513], [50, 0, 0, 700, 1000, 77]
    lens = [a + b for a, b in zip(queries, cached, strict=True)]
    cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", window=window, queries=queries)
    q = torch.randn(sum(queries), heads, dim, device="cuda").to(dtype)
    truth = expected(q, cache, queries, dim**-0.5)
    counts = np.array(queries, np.int32)
    starts = torch.tensor(np.concatenate(([0], np.cumsum(counts))), dtype=torch.int32, device="cuda")
    for max_q in (1, 513):
        launch = attention_prefill.config(max_q, heads // kv_heads, dim)
        listed = attention_prefill.tiles(
            np.arange(1, 6), counts[1:], np.array(lens[1:], np.int32), launch.block_m // (heads // kv_heads)
        )
        for pdl in (False, True):
            out = torch.full_like(q, float("nan"))
            attention_prefill.prefill(
                q, cache.k, cache.v, cache.table, cache.rows, starts, cache.seq_lens,
                torch.from_numpy(listed).cuda(), out, launch, scale=dim**-0.5, window=window, pdl=pdl,
            )  # fmt: skip
            check(out[1:], truth[1:])
            assert out[0].isnan().all()


@pytest.mark.parametrize("way", ["cudnn", "hopper"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("cached", "q_len", "count"),
    [(0, 1024, 2), (0, 700, 3), (0, 1537, 1), (300, 500, 1), (1500, 1029, 1), (1024, 512, 1)],
)
def test_dense_prefill(way: str, dtype: torch.dtype, dim: int, cached: int, q_len: int, count: int) -> None:
    if way == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9")
    queries, lens = [3] + [q_len] * count, [9] + [cached + q_len] * count
    cache = paged(lens, 2, dim, dtype=dtype, device="cuda")
    q = torch.randn(sum(queries), 8, dim, device="cuda").to(dtype)
    out = torch.full_like(q, float("nan"))
    part = attention_dense.DenseRows(1, count, 3, q_len, cached)
    attention_dense.dense(q, cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, part, out, dim**-0.5, way)
    truth = expected(q, cache, queries, dim**-0.5)
    check(out[3:], truth[3:])
    assert out[:3].isnan().all()


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (3, 3, 64), (16, 8, 128)])
@pytest.mark.parametrize(("cached", "q_len"), [(0, 1), (0, 129), (1000, 77), (255, 513)])
@pytest.mark.parametrize(("block_n", "stages"), [(128, 2), (64, 3)])
def test_hopper_prefill(
    heads: int, kv_heads: int, dim: int, cached: int, q_len: int, block_n: int, stages: int
) -> None:
    from octavo.kernels.cuda.attention_hopper import hopper

    cache = paged([cached + q_len] * 2, kv_heads, dim, dtype=BF16, device="cuda")
    q = torch.randn(5 + 2 * q_len, heads, dim, device="cuda").to(BF16)
    k, v = attention_dense.gather(cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, 0, 2, cached + q_len)
    truth = expected(q[5:], cache, [q_len] * 2, dim**-0.5)
    for _ in range(3):
        out = torch.full_like(q, float("nan"))
        hopper(q, k, v, out, 5, q_len, cached, dim**-0.5, block_n=block_n, stages=stages)
        check(out[5:], truth)
        assert out[:5].isnan().all()


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("whole_tables", [False, True])
def test_backend_runs_mixed_steps(window: int | None, whole_tables: bool) -> None:
    queries = [1, 1, 1, 5, 2100, 2100, 2500]
    cached = [40, 3000, 0, 30, 0, 0, 1200]
    lens = [a + b for a, b in zip(queries, cached, strict=True)]
    cache = paged(lens, 2, 128, dtype=BF16, device="cuda", window=window, queries=queries)
    group, spec = KVGroup(0, (0,), window), AttnSpec(8, 2, 128, 128**-0.5, window, 16)
    q = torch.randn(sum(queries), 8, 128, device="cuda").to(BF16)
    truth = expected(q, cache, queries, spec.scale).flatten(1)
    backend = CudaAttention(reference, (spec,), torch.device("cuda"), BF16)
    batch = batch_of(cache, queries, lens, whole_tables)
    meta = backend.plan(batch, group)
    assert meta.prefill is not None
    assert len(meta.prefill.dense) == (0 if window else 2)
    check(backend.run(q, batch.kv[0], meta, spec), truth)
    with without_pdl():
        check(backend.run(q, batch.kv[0], meta, spec), truth)


def batch_of(cache: Paged, queries: list[int], lens: list[int], whole_tables: bool) -> Batch:
    counts = np.array(queries, np.int32)
    tokens = torch.zeros(int(counts.sum()), dtype=torch.int64, device="cuda")
    starts = torch.tensor(np.concatenate(([0], np.cumsum(counts))), dtype=torch.int32, device="cuda")
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
        max_kv=max(lens),
        q_lens=counts,
        kv_lens=np.array(lens, np.int32),
        kv=(KVCache(cache.k, cache.v),),
        rows=cache.rows if whole_tables else None,
        row_tables=(cache.table,) if whole_tables else None,
    )
