"""SwiGLU's elementwise part, and the lookup of embeddings.

silu(g) * u = g / (1 + exp(-g)) * u (arXiv:2002.05202), float32 inside, rounded once.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cuda.launch import INTERPRET, cdiv, contiguous, kernel, pdl, pow2, supported

_BLOCK = 1024
"""Elements of a program of 128 threads: 16 bytes a thread in half types."""


@kernel()
def _silu_mul(
    gate_up: tl.tensor, y: tl.tensor, stride: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2m] -> silu(first half) * second half [..., m], in the same dtype."""
    width = gate_up.shape[-1]
    if width % 2 or not supported(gate_up):
        return reference.silu_mul(gate_up)
    rows = gate_up if gate_up.ndim == 2 and gate_up.stride(1) == 1 else gate_up.reshape(-1, width).contiguous()
    y = torch.empty((*gate_up.shape[:-1], width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        dependent = pdl()
        block = min(_BLOCK, pow2(width // 2))
        _silu_mul[(rows.shape[0], cdiv(width // 2, block))](
            rows,
            y,
            rows.stride(0),
            width // 2,
            BLOCK=block,
            PDL=dependent,
            launch_pdl=dependent,
            num_warps=4,
        )
    return y


@kernel()
def _embedding(
    tokens: tl.tensor, table: tl.tensor, y: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(tokens + row).to(tl.int64)
    tl.store(y + row * size + at, tl.load(table + token * size + at, mask=inside, other=0.0), mask=inside)


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """tokens [T] integers below V, table [V, hidden] contiguous -> [T, hidden]."""
    taken = tokens.ndim == 1 and table.ndim == 2 and contiguous(tokens, table)
    if not taken or not (tokens.is_cuda or INTERPRET):
        return reference.embedding(tokens, table)
    size = table.shape[1]
    y = torch.empty((tokens.shape[0], size), dtype=table.dtype, device=table.device)
    if y.numel():
        dependent = pdl()
        block = min(_BLOCK, pow2(size))
        _embedding[(tokens.shape[0], cdiv(size, block))](
            tokens, table, y, size, BLOCK=block, PDL=dependent, launch_pdl=dependent, num_warps=4
        )
    return y
