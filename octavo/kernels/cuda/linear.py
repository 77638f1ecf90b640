"""Matrix products for the engine's shapes: own kernels where they win, else cuBLAS; norm and SwiGLU fused where free.

`linear` overrides the reference's; `norm_linear` is a product behind the residual stream's RMSNorm, `add_linear` one
that adds to the stream. Owns no weights and picks launches by `linear_config`. Shapes, dtypes and devices that the
kernels do not cover go to the plain composition. All work is on the current stream; the split products of two streams
must not run at the same time (shared counters).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from octavo.kernels.cuda.activation import silu_mul
from octavo.kernels.cuda.launch import FLOATS, INTERPRET, cdiv, contiguous, is_hopper, pdl
from octavo.kernels.cuda.linear_config import MATVEC_ROWS, SKINNY_ROWS, Config, config, hopper_config
from octavo.kernels.cuda.linear_matvec import matvec
from octavo.kernels.cuda.linear_skinny import skinny
from octavo.kernels.cuda.norm import add_rms_norm, rms_norm

MAX_SPLIT_PROGRAMS = 4096
"""Counters for products whose sums are split over programs."""


class Norm(NamedTuple):
    """What precedes a product: RMSNorm of x + residual (or of x) times weight [K]."""

    residual: Tensor | None
    weight: Tensor
    eps: float


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]."""
    chosen = _config(x, weight, bias)
    return _many(x, weight, bias) if chosen is None else product(x, weight, bias, chosen)[0]


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in] that stacks gate and up -> silu(gate) * up [T, out / 2]."""
    chosen = _config(x, weight, bias, gated=True)
    return _many(x, weight, bias, True) if chosen is None else product(x, weight, bias, chosen, gated=True)[0]


def add_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> bool:
    """stream [T, out] += linear(x) in cuBLAS; False, with nothing done, where own kernels multiply."""
    if bias is not None or x.shape[0] <= SKINNY_ROWS or not x.is_cuda or not stream.is_contiguous():
        return False
    stream.addmm_(x, weight.t())
    return True


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """s = x + residual (or x); returns (y, s) with y = linear(rms_norm(s), weight, bias).

    x, residual [T, in], weight [out, in], bias [out] -> y [T, out], s [T, in]. `gated`: weight stacks gate and up, and
    y is silu_mul of the product, [T, out / 2]. Up to MATVEC_ROWS rows one kernel does it all; above, the normalised
    stream is written once and the product with its SwiGLU is one kernel, or two where cuBLAS multiplies.
    """
    chosen = _config(x, weight, bias, gated)
    if chosen is not None and chosen.rows <= MATVEC_ROWS and _normed(x, residual, norm_weight):
        return product(x, weight, bias, chosen, norm=Norm(residual, norm_weight, eps), gated=gated)
    if residual is None:
        h, stream = rms_norm(x, norm_weight, eps), x
    else:
        h, stream = add_rms_norm(x, residual, norm_weight, eps)
    return (gated_linear if gated else linear)(h, weight, bias), stream


def _many(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    """A product of many rows, and SwiGLU of it if gated: Hopper's own kernel where it is the faster one."""
    chosen = hopper_config(x.shape[0], *weight.shape, gated)
    if chosen is not None and is_hopper(x.device):
        from octavo.kernels.cuda import linear_hopper

        if linear_hopper.covers(x, weight, bias, gated):
            return linear_hopper.hopper_linear(x, weight, bias, gated=gated, config=chosen)
    y = F.linear(x, weight, bias)
    return silu_mul(y) if gated else y


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Config,
    *,
    norm: Norm | None = None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, stream) by the kernel of the given launch; only matvec takes a norm."""
    assert not gated or chosen.block_n > 1
    m, k = x.shape
    n = weight.shape[0]
    y = x.new_empty((m, n // 2 if gated else n))
    programs, dependent = cdiv(n, chosen.block_n), pdl()
    if chosen.rows <= MATVEC_ROWS:
        residual = None if norm is None else norm.residual
        stream = x if residual is None else torch.empty_like(x)
        matvec[(programs,)](
            x,
            x if residual is None else residual,
            x if norm is None else norm.weight,
            weight,
            weight if bias is None else bias,
            y,
            stream,
            m,
            n,
            0.0 if norm is None else norm.eps,
            k,
            chosen.rows,
            chosen.block_n,
            chosen.block_k,
            chosen.stages,
            norm is not None,
            residual is not None,
            bias is not None,
            gated,
            dependent,
            chosen.trigger,
            num_warps=chosen.warps,
            launch_pdl=dependent,
        )
        return y, stream
    assert norm is None
    parts = arrivals = y
    if chosen.split > 1:
        assert programs <= MAX_SPLIT_PROGRAMS
        parts = x.new_empty((programs * chosen.split * chosen.block_n * chosen.rows,), dtype=torch.float32)
        arrivals = _arrivals(x.device)
    skinny[(programs, chosen.split)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        parts,
        arrivals,
        m,
        n,
        k,
        chosen.rows,
        chosen.block_n,
        chosen.block_k,
        chosen.stages,
        chosen.split,
        chosen.groups,
        bias is not None,
        gated,
        dependent,
        chosen.trigger,
        num_warps=chosen.warps,
        launch_pdl=dependent,
    )
    return y, x


def _config(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Config | None:
    """The launch for these operands; None where the kernels do not read their dtypes, order or shapes."""
    dtype = x.dtype
    if dtype not in (torch.bfloat16, torch.float16) or weight.dtype != dtype or not (x.is_cuda or INTERPRET):
        return None
    if x.dim() != 2 or weight.dim() != 2 or not contiguous(x, weight):
        return None
    (m, k), (n, columns) = x.shape, weight.shape
    if not m or k != columns or (gated and n % 2):
        return None
    if bias is not None and (bias.shape != (n,) or bias.dtype != dtype or not bias.is_contiguous()):
        return None
    return config(m, n, k, gated)


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    """Whether the kernel reads these operands of a norm of x + residual."""
    shape = x.shape
    if residual is not None and (residual.dtype != x.dtype or residual.shape != shape or not contiguous(residual)):
        return False
    return weight.numel() == shape[1] and weight.ndim == 1 and weight.dtype in FLOATS and weight.is_contiguous()


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Arrival counters, zero between kernels. Not made while a graph is captured, which would zero them in replays."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    return torch.zeros(MAX_SPLIT_PROGRAMS, dtype=torch.int32, device=device)
