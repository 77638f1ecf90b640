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
from tests.support.qkv import newest, unwritten

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from octavo.attention.cuda import CudaAttention
from octavo.kernels.cuda import attention_decode, attention_prefill, rope_norm_write_kv, rotation
from octavo.kernels.cuda.attention_decode import DecodeConfig, NewTokens
from octavo.kernels.cuda.launch import without_pdl

BF16, FP16 = torch.bfloat16, torch.float16
HOPPER = pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.0")
# Each case is compiled for: few of them, that differ in everything.
SHAPES = [
    (32, 8, 128, BF16, None),
    (28, 4, 128, FP16, 200),
    (16, 8, 128, BF16, None),
    (9, 3, 64, BF16, 100),
    (8, 8, 32, FP16, None),
    (8, 1, 256, BF16, 5000),
]


def check(out: Tensor, truth: Tensor) -> None:
    """Close on the whole, and in each head of each token."""
    difference = out.double() - truth
    error = (difference.norm() / truth.norm()).item()
    assert error < 6e-3, f"relative error {error}"
    dim = truth.shape[-1] if truth.dim() == 3 else 128
    worst, norms = (x.reshape(-1, dim).norm(dim=-1) for x in (difference, truth))
    assert (worst <= 0.03 * norms).all(), f"token and head {(worst - 0.03 * norms).argmax().item()}"


def decode(
    q: Tensor,
    cache: Paged,
    launch: DecodeConfig,
    window: int | None,
    arrivals: Tensor,
    *,
    order: Tensor | None = None,
    heads: int | None = None,
    new: NewTokens | None = None,
    pdl: bool = False,
) -> Tensor:
    """With `new`, q is the qkv product and `heads` says how many of it are queries."""
    dim = cache.k.shape[-1]
    out = torch.full((len(q), heads or q.shape[1], dim), float("nan"), dtype=q.dtype, device="cuda")
    return attention_decode.decode(
        q, cache.k, cache.v, cache.table, cache.rows, cache.seq_lens, out, launch,
        scale=dim**-0.5, window=window, order=order, arrivals=arrivals, new=new, pdl=pdl,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype", "window"), SHAPES)
def test_decode(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None) -> None:
    lens = [1, 0, 16, 129, 777, 1500, 333]
    cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", window=window)
    q = torch.randn(len(lens), heads, dim, device="cuda").to(dtype)
    truth = expected(q, cache, [1] * len(lens), dim**-0.5)
    arrivals = torch.zeros(64, dtype=torch.int32, device="cuda")
    chosen = attention_decode.config(len(lens), kv_heads, heads // kv_heads, dim, 1500)
    for splits in (1, 2, 8, 64):
        check(decode(q, cache, replace(chosen, splits=splits), window, arrivals), truth)
    if (heads, dim) == (28, 128):
        for splits in (1, 2, 64):
            for pdl in (False, True):
                check(decode(q, cache, DecodeConfig(64, 4, 3, splits, False), window, arrivals, pdl=pdl), truth)
    assert not arrivals.any()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype", "window"), [*SHAPES, (16, 1, 64, BF16, None)])
def test_decode_of_the_qkv_product(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None, norms: bool
) -> None:
    """As one after another, but for sums in another order; the last two rows are padding.

    New places are NaN before each launch, so whoever reads one before it is written shows.
    """
    lens = [1, 16, 129, 777, 1500, 333, 1024, 1, 1]
    cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", window=window, heads_first=not norms)
    cache.table[cache.rows[-2:]] = 0
    slots = newest(cache)
    qkv = torch.randn(len(lens), (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    qkv[-1] = qkv[-2]
    width = dim if norms else dim // 2
    turn = rotation(cache.seq_lens.long() - 1, torch.rand(width // 2, device="cuda"), 1.0)
    weights = (torch.rand(2, dim, device="cuda") + 0.5).to(dtype)
    new = NewTokens(slots, turn, (weights[0], weights[1], 1e-6) if norms else None)
    arrivals = torch.zeros(256, dtype=torch.int32, device="cuda")
    order = torch.argsort(cache.seq_lens, descending=True).to(torch.int32)
    at = (slots // 16, slots % 16)
    q = rope_norm_write_kv(qkv, heads, turn, new.norms, cache.k, cache.v, slots)
    k, v = cache.k[at].clone(), cache.v[at].clone()
    chosen = attention_decode.config(len(lens), kv_heads, heads // kv_heads, dim, 1500)
    launches = [replace(chosen, splits=splits) for splits in (1, 2, 8, 64)] + [DecodeConfig(64, 4, 3, 8, False)]
    truths = [decode(q, cache, launch, window, arrivals).double() for launch in launches]
    for turns in range(5):
        for launch, truth in zip(launches, truths, strict=True):
            cache.k[at] = cache.v[at] = float("nan")
            found = decode(
                qkv, cache, launch, window, arrivals, order=order if turns else None, heads=heads, new=new
            )  # fmt: skip
            check(found, truth)
            torch.testing.assert_close(cache.k[at], k, rtol=2**-7, atol=1e-5)
            assert torch.equal(cache.v[at], v)
    assert not arrivals.any()


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(1, 32, 8, 128), (32, 32, 8, 128), (256, 9, 3, 64)])
def test_chosen_launches_replayed_in_a_graph_follow_growing_rows(
    rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    grown = torch.randint(1, 600, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
    cache = paged(grown, kv_heads, dim, dtype=BF16, device="cuda", heads_first=rows == 32)
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


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype", "window"), SHAPES)
def test_portable_prefill(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None) -> None:
    queries, cached = [1, 2, 300, 65, 16, 513], [50, 0, 0, 700, 1000, 77]
    lens = [a + b for a, b in zip(queries, cached, strict=True)]
    cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", window=window, queries=queries)
    q = torch.randn(sum(queries), heads, dim, device="cuda").to(dtype)
    truth = expected(q, cache, queries, dim**-0.5)
    for max_q in (1, 513) if window else (513,):
        launch = attention_prefill.config(max_q, heads // kv_heads, dim)
        starts, listed = items(queries, lens, launch.block_m // (heads // kv_heads))
        out = torch.full_like(q, float("nan"))
        attention_prefill.prefill(
            q, cache.k, cache.v, cache.table, cache.rows, starts, cache.seq_lens, listed, out, launch,
            scale=dim**-0.5, window=window, pdl=max_q > 1,
        )  # fmt: skip
        check(out[1:], truth[1:])
        assert out[0].isnan().all()


def items(queries: list[int], lens: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """Where rows' tokens begin, and the work of all rows but the first, which has one token."""
    counts, kv_lens = np.array(queries, np.int32), np.array(lens, np.int32)
    starts = torch.tensor(np.concatenate(([0], np.cumsum(counts))), dtype=torch.int32, device="cuda")
    listed = attention_prefill.tiles(np.arange(1, len(queries)), counts[1:], kv_lens[1:], tokens)
    return starts, torch.from_numpy(listed).cuda()


def mixes() -> dict[str, tuple[list[int], list[int]]]:
    """New and cached tokens of rows."""
    ints = np.random.default_rng(0).integers
    return {
        "fresh": ([1, 2, 5, 129, 1024, 700, 33, 64, 127, 128, 16], [8] + 10 * [0]),
        "cached": ([1, 77, 513, 2, 300, 16, 1, 260], [8, 1000, 255, 126, 31, 2040, 1500, 128]),
        "many": ([1, *ints(1, 400, 70).tolist()], [8, *(ints(0, 500, 70) * ints(0, 2, 70)).tolist()]),
        "long": ([1, 3001], [8, 1111]),
        "one": ([1, 1], [8, 0]),
    }


@HOPPER
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "page"),
    [(8, 2, 128, BF16, 16), (28, 4, 128, FP16, 16), (9, 3, 64, BF16, 16), (2, 2, 128, BF16, 64)],
)
def test_hopper_prefill(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, page: int) -> None:
    """Few and many items for a program, each more than once: whoever reads too early finds NaN or another block."""
    from octavo.kernels.cuda.attention_hopper import Hopper, fits

    assert fits(dtype, heads // kv_heads, dim, page)
    kernel = Hopper(heads, kv_heads, torch.device("cuda"))
    everything, few = kernel.programs, 7
    for name, (queries, cached) in mixes().items():
        lens = [a + b for a, b in zip(queries, cached, strict=True)]
        cache = paged(lens, kv_heads, dim, dtype=dtype, device="cuda", page=page)
        q = torch.randn(sum(queries), heads, dim, device="cuda").to(dtype)
        truth = expected(q, cache, queries, dim**-0.5)
        starts, listed = items(queries, lens, kernel.tokens)
        for programs in (everything, few, 1 << 20, everything):
            kernel.programs = programs
            out = torch.full_like(q, float("nan"))
            kernel.prefill(
                q, cache.k, cache.v, cache.table, cache.rows, starts, cache.seq_lens, listed, out,
                scale=dim**-0.5, pdl=True,
            )  # fmt: skip
            assert not out[1:].isnan().any(), name
            check(out[1:], truth[1:])
            assert out[0].isnan().all()


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("whole_tables", [False, True])
def test_backend_runs_mixed_steps(window: int | None, whole_tables: bool) -> None:
    queries = [1, 1, 1, 5, 1100, 300, 1500]
    cached = [40, 2000, 0, 30, 0, 0, 1200]
    lens = [a + b for a, b in zip(queries, cached, strict=True)]
    cache = paged(lens, 2, 128, dtype=BF16, device="cuda", window=window, queries=queries)
    group, spec = KVGroup(0, (0,), window), AttnSpec(8, 2, 128, 128**-0.5, window, 16)
    q = torch.randn(sum(queries), 8, 128, device="cuda").to(BF16)
    truth = expected(q, cache, queries, spec.scale).flatten(1)
    backend = CudaAttention(reference, (spec,), torch.device("cuda"), BF16)
    batch = batch_of(cache, queries, lens, whole_tables)
    meta = backend.plan(batch, group)
    assert meta.prefill is not None
    own = window is None and torch.cuda.get_device_capability()[0] == 9
    assert (meta.prefill.launch is None) == own
    qkv, turn = unwritten(q, batch.kv[0], batch.slots[0])
    check(backend.attend(qkv, batch.kv[0], meta, spec, turn, None), truth)
    with without_pdl():
        check(backend.attend(qkv, batch.kv[0], meta, spec, turn, None), truth)


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_backend_replays_steps_of_one_token_a_row(rows: int) -> None:
    lens = torch.randint(1, 900, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
    cache = paged(lens, 2, 128, dtype=BF16, device="cuda")
    group, spec = KVGroup(0, (0,), None), AttnSpec(8, 2, 128, 128**-0.5, None, 16)
    q = torch.randn(rows, 8, 128, device="cuda").to(BF16)
    truth = expected(q, cache, [1] * rows, spec.scale).flatten(1)
    backend = CudaAttention(reference, (spec,), torch.device("cuda"), BF16)
    batch = batch_of(cache, [1] * rows, lens, True)
    slots, kv = batch.slots[0], batch.kv[0]
    qkv, turn = unwritten(q, kv, slots)
    check(backend.attend(qkv, kv, backend.plan(batch, group), spec, turn, None), truth)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.attend(qkv, kv, backend.plan(batch, group), spec, turn, None)
    for _ in range(10):
        kv.k[slots // 16, slots % 16] = kv.v[slots // 16, slots % 16] = float("nan")
        out.fill_(float("nan"))
        graph.replay()
        check(out, truth)


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
        slots=(newest(cache, queries),),
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
