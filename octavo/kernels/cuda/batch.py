"""Row state on the device: what a decode step reads from it and what a plan changes in it, a launch each.

Nothing here is read on the host, so a captured graph that contains `prepare_decode` advances its rows at every replay.
KV groups' block tables are one tensor [G, R+1, max_blocks]; row R is padding.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from octavo.kernels import reference_batch
from octavo.kernels.cuda.launch import cdiv, contiguous, kernel, pdl

_BLOCK = 128


@kernel("size", "max_row")
def _prepare_decode(
    rows: tl.tensor,
    last_token: tl.tensor,
    num_computed: tl.tensor,
    tables: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    next_positions: tl.tensor,
    seq_lens: tl.tensor,
    slots: tl.tensor,
    size: tl.tensor,
    max_row: tl.tensor,
    group_stride: tl.tensor,
    row_stride: tl.tensor,
    slots_stride: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    real = inside & (row < max_row)
    position = tl.load(num_computed + row, mask=real, other=0)
    tl.store(tokens + at, tl.load(last_token + row, mask=real, other=0), mask=inside)
    tl.store(positions + at, position, mask=inside)
    tl.store(next_positions + at, position + 1, mask=inside)
    tl.store(seq_lens + at, (position + 1).to(tl.int32), mask=inside)
    for group in tl.static_range(GROUPS):
        entry = tables + group * group_stride + row * row_stride + position // BLOCK_SIZE
        block = tl.load(entry, mask=real, other=0).to(tl.int64)
        tl.store(slots + group * slots_stride + at, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    tl.store(num_computed + row, position + 1, mask=real)


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
    """Lays out a step of one token a row and advances num_computed by it.

    rows [B] integers, without repeats but for the padding row R; last_token, num_computed [R+1] int64; tables
    [G, R+1, max_blocks] int32. Writes tokens, positions, next_positions [B] int64 and seq_lens [B] int32, both
    position + 1, and slots [G, B] int64. A padding row is token 0 at position 0, goes to slot 0 (in the padding block)
    and does not grow.
    """
    plain = contiguous(rows, last_token, num_computed, tokens, positions, next_positions, seq_lens)
    if not plain or tables.stride(2) != 1 or slots.stride(1) != 1:
        reference_batch.prepare_decode(
            rows,
            last_token,
            num_computed,
            tables,
            block_size,
            tokens=tokens,
            positions=positions,
            next_positions=next_positions,
            seq_lens=seq_lens,
            slots=slots,
        )
        return
    size, dependent = rows.shape[0], pdl()
    _prepare_decode[(cdiv(size, _BLOCK),)](
        rows,
        last_token,
        num_computed,
        tables,
        tokens,
        positions,
        next_positions,
        seq_lens,
        slots,
        size,
        num_computed.shape[0] - 1,
        tables.stride(0),
        tables.stride(1),
        slots.stride(0),
        GROUPS=tables.shape[0],
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=4,
    )


@kernel("num_blocks", "num_values")
def _apply_diffs(
    tables: tl.tensor,
    places: tl.tensor,
    blocks: tl.tensor,
    num_computed: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    num_blocks: tl.tensor,
    num_values: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inside = at < num_blocks
    place = tl.load(places + at, mask=inside, other=0)
    tl.store(tables + place, tl.load(blocks + at, mask=inside, other=0), mask=inside)
    inside = at < num_values
    row = tl.load(rows + at, mask=inside, other=0)
    tl.store(num_computed + row, tl.load(values + at, mask=inside, other=0), mask=inside)


def apply_diffs(
    tables: Tensor, places: Tensor, blocks: Tensor, num_computed: Tensor, rows: Tensor, values: Tensor
) -> None:
    """As `reference_batch.apply_diffs`, in one launch; N or M may be 0."""
    if not contiguous(tables, places, blocks, num_computed, rows, values):
        reference_batch.apply_diffs(tables, places, blocks, num_computed, rows, values)
        return
    num_blocks, num_values = places.shape[0], rows.shape[0]
    most = max(num_blocks, num_values)
    if not most:
        return
    dependent = pdl()
    _apply_diffs[(cdiv(most, _BLOCK),)](
        tables,
        places,
        blocks,
        num_computed,
        rows,
        values,
        num_blocks,
        num_values,
        BLOCK=_BLOCK,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=4,
    )
