"""Every kernel function in plain torch: the meaning that other backends are compared with.

Runs on any device in float64, float32, bfloat16 and float16. Signatures are explained in `octavo.kernels.Kernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.kernels.reference_batch import apply_diffs, prepare_decode, slots, verify
from octavo.kernels.reference_sampling import apply_masks, apply_penalties, sample, sample_rows, top_logprobs

__all__ = [
    "add_linear",
    "add_rms_norm",
    "apply_diffs",
    "apply_masks",
    "apply_penalties",
    "embedding",
    "gated_linear",
    "linear",
    "norm_linear",
    "prepare_decode",
    "rms_norm",
    "rope_norm_write_kv",
    "rotation",
    "sample",
    "sample_rows",
    "silu_mul",
    "slots",
    "top_logprobs",
    "verify",
]


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, tokens)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return silu_mul(linear(x, weight, bias))


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    h, stream = (rms_norm(x, norm_weight, eps), x) if residual is None else add_rms_norm(x, residual, norm_weight, eps)
    return (gated_linear if gated else linear)(h, weight, bias), stream


def add_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> bool:
    return False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype in (torch.bfloat16, torch.float16):
        return F.silu(gate.float()).mul_(up).to(gate_up.dtype)
    return F.silu(gate).mul_(up)


def rotation(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles = positions.to(inv_freq.dtype).unsqueeze(1) * inv_freq
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)


def rope_norm_write_kv(
    qkv: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    kv_heads, dim = k_cache.shape[2:]
    qk, v = torch.split(qkv.view(qkv.shape[0], -1, dim), [num_heads + kv_heads, kv_heads], 1)
    if norms is not None:
        q_weight, k_weight, eps = norms
        q, k = torch.split(qk, [num_heads, kv_heads], 1)
        qk = torch.cat((rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)), 1)
    q, k = torch.split(_rotate(qk, *rotation), [num_heads, kv_heads], 1)
    k_cache.view(-1, kv_heads, dim).index_copy_(0, slots, k)
    v_cache.view(-1, kv_heads, dim).index_copy_(0, slots, v)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, dim] with its first cos.shape[-1] dimensions rotated, in x's dtype."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((_rotate(x[..., :width], cos, sin), x[..., width:]), -1)
    rotated = (x * cos).add_(x.roll(width // 2, -1) * sin)
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)
