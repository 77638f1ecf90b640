"""Rotary positions: the step's cosines and sines, and one kernel from the qkv product to queries and cache.

`attention_decode` does the same to rows of one token by itself, with the device functions here.

With R the rotated width and i < R / 2, pairs (x[i], x[i + R/2]) turn by the angle position * inv_freq[i]
(arXiv:2104.09864): y = x * cos + swapped(x) * sin, where swapped exchanges the halves and the first half of the sines
carries the minus. All in float32, rounded once at the end, with the heads' RMSNorm before it where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cuda.launch import cdiv, contiguous, kernel, pdl, pow2, supported


@kernel()
def _rotation(
    positions: tl.tensor,
    inv_freq: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    freq_stride: tl.tensor,
    pairs: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < pairs
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angle = tl.load(positions + token).to(tl.float32) * tl.load(
        inv_freq + token * freq_stride + at, mask=inside, other=0.0
    )
    c, s = tl.cos(angle) * scale, tl.sin(angle) * scale
    first = token * 2 * pairs + at
    tl.store(cos + first, c, mask=inside)
    tl.store(cos + first + pairs, c, mask=inside)
    tl.store(sin + first, -s, mask=inside)
    tl.store(sin + first + pairs, s, mask=inside)


def rotation(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """positions [T], inv_freq [pairs] or [T, pairs] float32 -> cos, sin [T, 1, 2 * pairs]: see `Kernels.rotation`."""
    read = positions.ndim == 1 and contiguous(positions) and inv_freq.stride(-1) == 1
    fitting = inv_freq.ndim == 1 or inv_freq.shape[0] == positions.shape[0]
    if not read or not fitting or inv_freq.dtype != torch.float32 or not supported(inv_freq):
        return reference.rotation(positions, inv_freq, scale)
    pairs = inv_freq.shape[-1]
    shape = (positions.shape[0], 1, 2 * pairs)
    cos = torch.empty(shape, dtype=torch.float32, device=inv_freq.device)
    sin = torch.empty(shape, dtype=torch.float32, device=inv_freq.device)
    if cos.numel():
        dependent = pdl()
        _rotation[(positions.shape[0],)](
            positions,
            inv_freq,
            cos,
            sin,
            inv_freq.stride(0) if inv_freq.ndim == 2 else 0,
            pairs,
            scale,
            BLOCK=pow2(pairs),
            PDL=dependent,
            launch_pdl=dependent,
            num_warps=1,
        )
    return cos, sin


@kernel()
def partner(d: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """The dimension that each of d turns with; beyond WIDTH itself."""
    return tl.where(d < WIDTH, tl.where(d < WIDTH // 2, d + WIDTH // 2, d - WIDTH // 2), d)


@kernel()
def load_norms(
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    is_q: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
) -> Any:
    """The norm weights of heads, [heads, BLOCK_D] float32, and those of the partners; () without norms."""
    weights: tl.tuple = ()
    if NORM:
        d = tl.arange(0, BLOCK_D)
        weight = tl.where(is_q, q_weight, k_weight)[:, None]
        weights = (
            tl.load(weight + d[None, :], mask=inside, other=0.0).to(tl.float32),
            tl.load(weight + partner(d, WIDTH)[None, :], mask=inside, other=0.0).to(tl.float32),
        )
    return weights


@kernel()
def load_turned(
    source: tl.tensor,
    inside: tl.tensor,
    norms: tl.tuple,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
) -> Any:
    """Heads of one token as they are, and normalised and rotated in float32, both [heads, BLOCK_D].

    `source` [heads, 1] points at the heads, `inside` [heads, BLOCK_D] says what to load, `cos` and `sin` point at the
    token's; `norms` are what `load_norms` returned.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    turning = inside & (d < WIDTH)
    plain = tl.load(source + d, mask=inside, other=0.0)
    swapped = tl.load(source + partner(d, WIDTH), mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(sin + d, mask=turning, other=0.0).to(tl.float32)
    x = plain.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x = x * scale * norms[0]
        swapped = swapped * scale * norms[1]
    return plain, x * c + swapped * s


@kernel()
def _rope_norm_write_kv(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    eps: tl.tensor,
    qkv_stride: tl.tensor,
    block_stride: tl.tensor,
    place_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program owns HEADS neighbouring heads (of q, k and v side by side) of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    is_q, is_v = head < NUM_HEADS, head >= NUM_HEADS + KV_HEADS
    inside = (head < NUM_HEADS + 2 * KV_HEADS)[:, None] & (d < DIM)[None, :]
    norms = load_norms(q_weight, k_weight, is_q, inside, WIDTH, BLOCK_D, NORM)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + token).to(tl.int64)
    source = qkv + token * qkv_stride + head[:, None] * DIM
    turn = token * WIDTH
    plain, turned = load_turned(source, inside, norms, eps, cos + turn, sin + turn, DIM, WIDTH, BLOCK_D, NORM)
    at_q = q + token * (NUM_HEADS * DIM) + head[:, None] * DIM + d[None, :]
    tl.store(at_q, turned.to(q.dtype.element_ty), mask=inside & is_q[:, None])
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * place_stride
    at_k = place + (head - NUM_HEADS)[:, None] * head_stride + d[None, :]
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + KV_HEADS)
    tl.store(k_cache + at_k, turned.to(k_cache.dtype.element_ty), mask=inside & is_k[:, None])
    at_v = at_k - KV_HEADS * head_stride
    tl.store(v_cache + at_v, plain.to(v_cache.dtype.element_ty), mask=inside & is_v[:, None])


def readable(qkv: Tensor, cos: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels can work on these, the sines being like the cosines: see `rope_norm_write_kv`."""
    strides = k_cache.stride()
    if strides != v_cache.stride() or strides[3] != 1 or qkv.stride()[1] != 1:
        return False
    turned = cos.numel() == qkv.shape[0] * cos.shape[-1] and cos.is_contiguous()
    return turned and supported(qkv, cos, k_cache)


def rope_norm_write_kv(
    qkv: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Splits qkv, normalises q and k per head, rotates them, writes k and v; returns q [T, heads, dim].

    Arguments as for `Kernels.rope_norm_write_kv`. The caches may be strided views with contiguous heads.
    """
    cos, sin = rotation
    block_size, kv_heads, dim = k_cache.shape[1:]
    fitting = qkv.shape == (slots.numel(), (num_heads + 2 * kv_heads) * dim) and sin.numel() == cos.numel()
    q_weight, k_weight, eps = norms if norms is not None else (cos, cos, 0.0)
    fitting = fitting and contiguous(sin, slots, q_weight, k_weight)
    if norms is not None:
        fitting = fitting and q_weight.numel() == k_weight.numel() == dim
    if not fitting or not readable(qkv, cos, k_cache, v_cache):
        return reference.rope_norm_write_kv(qkv, num_heads, rotation, norms, k_cache, v_cache, slots)
    tokens, width = qkv.shape[0], cos.shape[-1]
    q = torch.empty((tokens, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return q
    block_d = pow2(dim)
    # few tokens: many small programs, whose latency is the shortest; many: enough bytes in flight a program
    heads = max(1, (512 if tokens <= 64 else 1024) // block_d)
    dependent = pdl()
    _rope_norm_write_kv[(tokens, cdiv(num_heads + 2 * kv_heads, heads))](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        slots,
        q,
        k_cache,
        v_cache,
        eps,
        qkv.stride(0),
        *k_cache.stride()[:3],
        NUM_HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        WIDTH=width,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        BLOCK_D=block_d,
        NORM=norms is not None,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=4,
    )
    return q
