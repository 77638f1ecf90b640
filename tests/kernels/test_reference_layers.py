"""Kernel functions of layers against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.kernels import load

K = load("cpu")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of one rounding, and a little."""
DTYPES = list(TOLERANCE)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    tolerance = TOLERANCE[actual.dtype] * roundings
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tpu'"):
        load("tpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = normal(5, 48, dtype=dtype) * 3, normal(48, dtype=dtype, seed=1)
    close(K.rms_norm(x, weight, 1e-5), norm64(x, weight, 1e-5), roundings=2)
    big = torch.full((1, 48), 300.0, dtype=dtype)  # squares leave float16
    close(K.rms_norm(big, weight, 1e-5), norm64(big, weight, 1e-5), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, stream, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(5, 48), (5, 48), (48,)]))
    before = stream.clone()
    y, total = K.add_rms_norm(x, stream, weight, 1e-5)
    assert torch.equal(total, x + stream)
    assert torch.equal(stream, before)
    close(y, norm64(total, weight, 1e-5), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    x = normal(7, 64, dtype=dtype) * 4
    gate, up = x.double()[:, :32], x.double()[:, 32:]
    close(K.silu_mul(x), gate / (1 + (-gate).exp()) * up, roundings=2)


def test_rotation() -> None:
    inv_freq = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    cos, sin = K.rotation(torch.tensor([0, 3]), inv_freq, 2.0)
    assert cos.shape == sin.shape == (2, 1, 6)
    assert cos[1, 0].tolist() == pytest.approx([2 * math.cos(3 * f) for f in (1, 0.1, 0.01)] * 2)
    expected = [s * 2 * math.sin(3 * f) for s in (-1, 1) for f in (1, 0.1, 0.01)]
    assert sin[1, 0].tolist() == pytest.approx(expected)
    per_token = K.rotation(torch.tensor([0, 3]), inv_freq.expand(2, 3), 2.0)
    assert torch.equal(per_token[0], cos)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_norm_write_kv(dtype: torch.dtype, width: int, with_norms: bool) -> None:
    tokens, heads, kv_heads, dim = 5, 4, 2, 8
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norms = (normal(dim, dtype=dtype, seed=1), normal(dim, dtype=dtype, seed=2), 1e-6) if with_norms else None
    positions = torch.tensor([0, 9, 1, 30, 4])
    freq_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rotation = K.rotation(positions, torch.logspace(0, -2, width // 2, dtype=freq_dtype), 1.0)
    k_cache, v_cache = (torch.full((6, 4, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2))
    slots = torch.tensor([4, 23, 5, 0, 6])
    q = K.rope_norm_write_kv(qkv, heads, rotation, norms, k_cache, v_cache, slots)

    x = qkv.double().view(tokens, -1, dim)
    want_q, want_k, want_v = x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]
    if norms is not None:
        want_q, want_k = norm64(want_q, norms[0], 1e-6), norm64(want_k, norms[1], 1e-6)
    close(q, rotate64(want_q, positions, width), roundings=4)
    close(k_cache.flatten(0, 1)[slots], rotate64(want_k, positions, width), roundings=4)
    assert torch.equal(v_cache.flatten(0, 1)[slots].double(), want_v)
    others = [i for i in range(24) if i not in slots.tolist()]
    assert bool(k_cache.flatten(0, 1)[others].isnan().all())
    assert bool(v_cache.flatten(0, 1)[others].isnan().all())


def rotate64(x: Tensor, positions: Tensor, width: int) -> Tensor:
    out, half = x.clone(), width // 2
    for pair in range(half):
        angle = positions.double() * torch.logspace(0, -2, half, dtype=torch.float64)[pair]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., pair], x[..., pair + half]
        out[..., pair], out[..., pair + half] = a * cos - b * sin, b * cos + a * sin
    return out
