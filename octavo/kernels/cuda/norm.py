"""RMSNorm, alone and with the residual added first.

y = x * w / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467), float32 inside, rounded once. One program
a row, the whole row in registers. With a residual the sum s = x + residual is rounded to the stream's dtype and
written first, and y is the norm of what was written.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cuda.launch import kernel, pdl, pow2, supported


@kernel()
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    w = tl.load(weight + at, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * size + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(y + row * size + at, (value * scale * w.to(tl.float32)).to(y.dtype.element_ty), mask=inside)


def _warps(size: int) -> int:
    """Eight elements a thread, one 16-byte load in half types, up to rows of 4,096."""
    return min(16, max(1, pow2(size) // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n], weight [n] -> [..., n] in x's dtype: x / sqrt(mean(x^2) + eps) * weight."""
    size = weight.numel()
    fitting = x.shape[-1] == size and weight.ndim == 1 and weight.is_contiguous()
    if not fitting or not supported(x, weight):
        return reference.rms_norm(x, weight, eps)
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, size).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        dependent = pdl()
        _rms_norm[(rows.shape[0],)](
            rows,
            rows,
            weight,
            y,
            y,
            rows.stride(0),
            0,
            size,
            eps,
            BLOCK=pow2(size),
            ADD=False,
            PDL=dependent,
            launch_pdl=dependent,
            num_warps=_warps(size),
        )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T, n], weight [n] -> (rms_norm(s), s) with s = x + residual, all in x's dtype."""
    shape, size = x.shape, weight.numel()
    same = shape == residual.shape and x.dtype == residual.dtype
    fitting = len(shape) == 2 and shape[1] == size and weight.ndim == 1 and weight.is_contiguous()
    if not same or not fitting or not supported(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        dependent = pdl()
        _rms_norm[(x.shape[0],)](
            x,
            residual,
            weight,
            y,
            total,
            x.stride(0),
            residual.stride(0),
            size,
            eps,
            BLOCK=pow2(size),
            ADD=True,
            PDL=dependent,
            launch_pdl=dependent,
            num_warps=_warps(size),
        )
    return y, total
