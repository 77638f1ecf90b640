"""Row state updates and batch preparation in plain torch.

A running sequence owns a row of device-resident state; a step's plan names rows and counts. `prepare` turns them into
the ragged batch that layers see. A fused kernel can override each function by name.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    rows [B] int64, without repeats but for the padding row R; last_token, num_computed [R+1] int64; tables
    [G, R+1, max_blocks] int32. Writes tokens, positions, next_positions [B] int64 and seq_lens [B] int32, both
    position + 1, and slots [G, B] int64. A padding row is token 0 at position 0, goes to slot 0 (in the padding block)
    and does not grow.
    """
    padding = rows == num_computed.shape[0] - 1
    begin = num_computed[rows].masked_fill(padding, 0)
    tokens.copy_(last_token[rows].masked_fill(padding, 0))
    positions.copy_(begin)
    next_positions.copy_(begin + 1)
    seq_lens.copy_(begin + 1)
    blocks = tables[:, rows, begin // block_size].long().masked_fill(padding, 0)
    slots.copy_(blocks * block_size + begin % block_size)
    num_computed[rows] = begin + (~padding).long()


def apply_diffs(
    tables: Tensor, places: Tensor, blocks: Tensor, num_computed: Tensor, rows: Tensor, values: Tensor
) -> None:
    """tables.view(-1)[places] = blocks and num_computed[rows] = values.

    tables [G, R+1, max_blocks] int32 contiguous; places [N] int64 without repeats, blocks [N] int32; num_computed
    [R+1], rows without repeats and values [M] int64.
    """
    tables.view(-1)[places] = blocks
    num_computed[rows] = values


def slots(table: Tensor, row_of: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """[T] int64: block * block_size + offset of each token's KV. table [B, max_blocks] int32: the batch's blocks."""
    blocks = table[row_of, positions // block_size].long()
    return blocks * block_size + positions % block_size


def verify(sampled: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps of each drafted row's samples the accepted ones and one more.

    The draft is accepted as far as it equals what was sampled: since a token's random numbers depend on seed and
    position alone, the result is exactly what sampling without drafts gives, whatever the distribution.

    sampled: [D, K+1] int64, the token sampled after the row's last token and after each draft; drafts: [D, K] int64;
    counts: [D] int64, 1 + the row's drafts (entries behind are ignored). Returns the number of tokens kept [D] int64
    and the last of them [D] int64.
    """
    within = torch.arange(drafts.shape[1], device=drafts.device) < (counts - 1)[:, None]
    accepted = ((sampled[:, :-1] == drafts) & within).long().cumprod(1).sum(1)
    return accepted + 1, sampled.gather(1, accepted[:, None])[:, 0]
