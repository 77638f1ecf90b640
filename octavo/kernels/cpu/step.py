"""What a step needs before its layers: its batch, the tokens' rows of the embedding, their angles."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cpu.native import Gather, PrepareDecode, Rotation, dense, functions, run


def prepare_decode(
    rows: Tensor,
    last_token: Tensor,
    num_computed: Tensor,
    tables: Tensor,
    block_size: int,
    *,
    tokens: Tensor,
    positions: Tensor,
    next_positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
) -> None:
    whole = (rows, last_token, num_computed, tokens, positions, next_positions)
    assert all(t.is_contiguous() and t.dtype == torch.int64 for t in whole)
    assert tables.dtype == seq_lens.dtype == torch.int32
    assert tables.stride(2) == seq_lens.stride(0) == slots.stride(1) == 1
    step = PrepareDecode(
        rows.data_ptr(),
        last_token.data_ptr(),
        num_computed.data_ptr(),
        tables.data_ptr(),
        tokens.data_ptr(),
        positions.data_ptr(),
        next_positions.data_ptr(),
        seq_lens.data_ptr(),
        slots.data_ptr(),
        rows.shape[0],
        num_computed.shape[0] - 1,
        tables.shape[0],
        tables.stride(0),
        tables.stride(1),
        slots.stride(0),
        block_size,
    )
    run(functions().prepare_decode, step, 0)


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    if not table.is_contiguous() or not table.is_cpu or not tokens.is_contiguous() or tokens.dtype != torch.int64:
        return reference.embedding(tokens, table)
    out = table.new_empty((tokens.shape[0], table.shape[1]))
    size = table.shape[1] * table.itemsize
    gather = Gather(tokens.data_ptr(), table.data_ptr(), out.data_ptr(), tokens.shape[0], size)
    run(functions().gather, gather, out.numel())
    return out


def rotation(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not dense(inv_freq) or inv_freq.dtype != torch.float32 or not positions.is_contiguous():
        return reference.rotation(positions, inv_freq, scale)
    count, pairs = positions.shape[0], inv_freq.shape[-1]
    cos, sin = (inv_freq.new_empty((count, 1, 2 * pairs)) for _ in range(2))
    stride = 0 if inv_freq.dim() == 1 else pairs
    angles = Rotation(
        positions.data_ptr(), inv_freq.data_ptr(), cos.data_ptr(), sin.data_ptr(), count, pairs, stride, scale
    )
    run(functions().rotation, angles, 64 * cos.numel())
    return cos, sin
