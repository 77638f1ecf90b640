"""The C kernels of layers against the reference, for every target that this machine can run."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels import cpu, reference
from octavo.kernels.cpu import build

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(build.available() is not None, reason="needs a C compiler"),
]

HALVES = [torch.float32, torch.bfloat16]
NORM = {torch.float32: 3e-6, torch.bfloat16: 1 / 128}
"""Tolerated error relative to the largest value."""


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=NORM[dtype] * scale)


TOKENS = [0, 1, 2, 3, 4, 6, 7, 12, 13, 25, 129, 161]


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("weight_type", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_linear(dtype: torch.dtype, weight_type: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, (in_, out), bias in itertools.product(TOKENS, [(64, 24), (70, 13), (1541, 9), (5, 1)], [False, True]):
        x, weight = torch.randn(tokens, in_).to(dtype), torch.randn(out, in_).to(weight_type)
        b = torch.randn(out).to(weight_type) if bias else None
        found = cpu.linear(x, weight, b)
        assert found.dtype == dtype
        close(found, reference.linear(x.double(), weight.double(), None if b is None else b.double()), dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "weight_type"), [(a, b) for a in HALVES for b in HALVES])
def test_norm_linear(dtype: torch.dtype, weight_type: torch.dtype, gated: bool) -> None:
    torch.manual_seed(4)
    for tokens, (in_, out), added in itertools.product([1, 2, 5, 14, 161], [(64, 24), (37, 26)], [False, True]):
        x, residual = torch.randn(tokens, in_).to(dtype), torch.randn(tokens, in_).to(dtype)
        weight, norm = torch.randn(out, in_).to(weight_type), torch.randn(in_).to(dtype)
        bias = torch.randn(out).to(weight_type) if added else None
        found, total = cpu.norm_linear(x, residual if added else None, norm, 1e-5, weight, bias, gated)
        assert found.dtype == dtype
        assert torch.equal(total, x + residual if added else x)
        exact = None if bias is None else bias.double()
        expected = reference.norm_linear(total.double(), None, norm.double(), 1e-5, weight.double(), exact, gated)[0]
        close(found, expected, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    in_=st.integers(1, 700),
    out=st.integers(1, 70),
    gap=st.integers(0, 3),
    half=st.booleans(),
)
def test_linear_of_any_shape(tokens: int, in_: int, out: int, gap: int, half: bool) -> None:
    dtype = HALVES[half]
    x, weight = torch.randn(tokens, in_ + gap).to(dtype)[:, :in_], torch.randn(out, in_).to(dtype)
    close(cpu.linear(x, weight, None), reference.linear(x.double(), weight.double(), None), dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 8), (3, 13), (2, 3, 64), (700, 64), (0, 8)])
def test_norms_and_activation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, residual, weight = (
        torch.randn(shape).to(dtype) * 3,
        torch.randn(shape).to(dtype),
        torch.randn(shape[-1]).to(dtype),
    )
    close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5), dtype)
    normed, total = cpu.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    close(normed, reference.rms_norm(total.double(), weight.double(), 1e-5), dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype) * 20
    close(cpu.silu_mul(wide), reference.silu_mul(wide.double()), dtype)


def test_silu_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -0.0, 0.0, 88.5, 200.0, 1e30, float("nan"), float("inf")])
    found = cpu.silu_mul(torch.cat((gate, torch.ones(10)))[None])
    torch.testing.assert_close(found, torch.nn.functional.silu(gate)[None], atol=1e-30, rtol=1e-6, equal_nan=True)


def test_narrowing_rounds_to_even_and_keeps_nan() -> None:
    values = torch.tensor([1.00390625, 1.01171875, float("nan"), float("inf"), -float("inf"), 3.3895e38, 1e-40] * 5)
    x, identity = values[None].bfloat16(), torch.eye(40).bfloat16()
    finite = values[:2].repeat(20)[None]
    assert torch.equal(cpu.linear(finite.bfloat16(), identity, None), finite.bfloat16())
    total = cpu.add_rms_norm(x, torch.zeros_like(x), torch.ones(35).bfloat16(), 1e-5)[1]
    assert torch.equal(total.view(torch.int16), x.view(torch.int16))
    sums = torch.randn(1, 4096).bfloat16(), torch.randn(1, 4096).bfloat16()
    assert torch.equal(cpu.add_rms_norm(*sums, torch.ones(4096).bfloat16(), 1e-5)[1], sums[0] + sums[1])


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(("dtype", "cache_type"), [(a, b) for a in HALVES for b in HALVES])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("dim", "width"), [(64, 64), (10, 6), (24, 24), (64, 16)])
def test_rope_norm_write_kv(dtype: torch.dtype, cache_type: torch.dtype, norms: bool, dim: int, width: int) -> None:
    torch.manual_seed(2)
    tokens, heads, kv_heads = 7, 6, 2
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    rotation = reference.rotation(torch.randint(0, 1000, (tokens,)), torch.rand(width // 2), 1.25)
    weights = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6) if norms else None
    slots = torch.randperm(5 * 4)[:tokens]
    caches = [torch.full((5, 4, kv_heads, dim), float("nan"), dtype=cache_type) for _ in range(2)]
    exact = [torch.full_like(cache, float("nan"), dtype=torch.float64) for cache in caches]
    q = cpu.rope_norm_write_kv(qkv, heads, rotation, weights, caches[0], caches[1], slots)
    weights64 = None if weights is None else (weights[0].double(), weights[1].double(), 1e-6)
    rotation64 = (rotation[0].double(), rotation[1].double())
    expected = reference.rope_norm_write_kv(qkv.double(), heads, rotation64, weights64, exact[0], exact[1], slots)
    close(q, expected, dtype)
    written = torch.zeros(20, dtype=torch.bool)
    written[slots] = True
    for found, want in zip(caches, exact, strict=True):
        rows = found.view(20, kv_heads, dim)
        assert bool(rows[~written].isnan().all())
        close(rows[written], want.view(20, kv_heads, dim)[written], cache_type)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_go_to_the_reference(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 16).to(dtype), torch.randn(4, 16).to(dtype)
    assert torch.equal(cpu.linear(x, weight, None), reference.linear(x, weight, None))
    assert torch.equal(cpu.rms_norm(x, weight[0], 1e-5), reference.rms_norm(x, weight[0], 1e-5))
    assert torch.equal(cpu.silu_mul(x), reference.silu_mul(x))


def test_threads_change_nothing() -> None:
    x, weight = torch.randn(9, 600), torch.randn(500, 600)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.linear(x, weight, None))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
