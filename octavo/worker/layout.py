"""The ragged batch of a step, laid out on the host: which token stands where, and what of it is sampled.

Pure arithmetic on a plan and the rows' positions. What only the device knows, the last tokens, is named by place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import Int32s, Plan

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """T tokens of B rows; S of the tokens are projected to logits."""

    counts: Int32s
    """[B] tokens of each row."""
    starts: Int32s
    """[B] first position that each row computes."""
    tokens: Int64s
    """[T] token ids, 0 where the row state has them."""
    from_state: Int64s
    """Indices into T of the tokens that come from the row state, of the first rows in order."""
    positions: Int64s
    row_of: Int64s
    q_start: Int32s
    """[B+1]"""
    logits_at: Int64s
    """[S] indices into T: decode rows' only token, all of drafted rows, the last of closing ones."""
    repeats: Int32s
    """[sampled rows] how many of the S belong to each."""

    @property
    def kv_lens(self) -> Int32s:
        return self.starts + self.counts

    @property
    def ends(self) -> Int64s | None:
        """Indices into T that the last layer can go on with alone: `logits_at`; None where that saves little.

        Where nothing is sampled it is the last token, because kernels want one.
        """
        if 2 * len(self.logits_at) > len(self.tokens):
            return None
        return self.logits_at if len(self.logits_at) else np.array([len(self.tokens) - 1])


def lay_out(plan: Plan, computed: NDArray[Any]) -> Layout:
    """`computed` [R+1]: tokens of each row whose KV exists before the step."""
    first = plan.num_decode + plan.num_drafted
    counts = np.concatenate((np.ones(plan.num_decode, np.int32), plan.counts))
    ends = np.cumsum(counts, dtype=np.int32)
    begins = ends - counts
    starts = computed[plan.rows].astype(np.int32)
    row_of = np.repeat(np.arange(len(counts)), counts)
    total = int(ends[-1])
    tokens = np.zeros(total, np.int64)
    known = np.ones(total, np.bool_)
    known[begins[:first]] = False
    tokens[known] = plan.tokens
    repeats = np.ones(plan.num_sampled, np.int32)
    repeats[plan.num_decode : first] = plan.counts[: plan.num_drafted]
    drafted = np.arange(plan.num_decode, plan.num_decode + int(plan.counts[: plan.num_drafted].sum()))
    return Layout(
        counts=counts,
        starts=starts,
        tokens=tokens,
        from_state=begins[:first].astype(np.int64),
        positions=(starts - begins).astype(np.int64)[row_of] + np.arange(total),
        row_of=row_of,
        q_start=np.concatenate((begins, ends[-1:])),
        logits_at=np.concatenate((np.arange(plan.num_decode), drafted, ends[first : plan.num_sampled] - 1)),
        repeats=repeats,
    )
