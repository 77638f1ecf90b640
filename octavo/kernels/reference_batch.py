"""Row state updates and batch preparation in plain torch.

A running sequence owns a row of device-resident state; a step's plan names rows and counts. `prepare` turns them into
the ragged batch that layers see. A fused kernel can override each function by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """T tokens of B rows: see `octavo.attention.Batch` for the meaning of each tensor."""

    tokens: Tensor
    positions: Tensor
    row_of: Tensor
    q_start: Tensor
    seq_lens: Tensor


def prepare(
    rows: Tensor, counts: Tensor, num_from_state: int, packed: Tensor, last_token: Tensor, num_computed: Tensor
) -> Ragged:
    """Lays out the step's tokens.

    rows, counts: [B] int64, the batch's rows and how many tokens each computes. The first `num_from_state` rows take
    their first token from `last_token` [R] int64; every other token comes from `packed` int64, in order. num_computed:
    [R] int64.
    """
    device = rows.device
    ends = counts.cumsum(0)
    starts = ends - counts
    total = num_from_state + packed.shape[0]
    row_of = torch.repeat_interleave(torch.arange(rows.shape[0], device=device), counts, output_size=total)
    begin = num_computed[rows]
    positions = (begin - starts)[row_of] + torch.arange(total, device=device)
    tokens = torch.empty(total, dtype=torch.int64, device=device)
    known = torch.ones(total, dtype=torch.bool, device=device)
    first = starts[:num_from_state]
    known[first] = False
    tokens[first] = last_token[rows[:num_from_state]]
    tokens[known] = packed
    q_start = torch.cat((starts, ends[-1:])).to(torch.int32)
    return Ragged(tokens, positions, row_of, q_start, (begin + counts).to(torch.int32))


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
