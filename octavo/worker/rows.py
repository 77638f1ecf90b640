"""Device-resident state of running sequences, one row each, changed only by what plans say.

Row `max_rows` is the padding row: it exists, holds neutral values and is never given to a sequence. Sampling keeps its
own state per row (`octavo.sampling`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.core.plan import Plan
from octavo.worker.staging import Uploader


def longest_first(lengths: NDArray[Any]) -> NDArray[np.int32]:
    """Indices of rows of these lengths in the order that leaves no long row for the end."""
    return np.argsort(-lengths, kind="stable").astype(np.int32)


class RowState:
    """last_token, num_computed: [R+1] int64; tables: [G, R+1, max_blocks] int32 block ids, per KV group."""

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int, device: torch.device) -> None:
        self.last_token = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_groups, max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self.host_computed = np.zeros(max_rows + 1, np.int64)
        """Mirror of num_computed; rows with drafts are corrected by the plan's `rewind` before they run again."""

    def apply(self, plan: Plan, upload: Uploader) -> None:
        """Admissions, rewinds and new blocks."""
        changed = [(admit.row, admit.num_computed) for admit in plan.admit] + list(plan.rewind)
        if not changed and not plan.blocks:
            return
        rows, values = np.array(changed, np.int64).reshape(-1, 2).T
        self.host_computed[rows] = values
        lengths = np.array([len(ids) for _, _, _, ids in plan.blocks], np.int64)
        width = self.tables.shape[2]
        line = self.tables.shape[1] * width
        begin = np.array([group * line + row * width + first for row, group, first, _ in plan.blocks], np.int64)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        blocks = np.array([block for _, _, _, ids in plan.blocks for block in ids], np.int32)
        at, ids, device_rows, device_values = upload(np.repeat(begin, lengths) + within, blocks, rows, values)
        self.tables.view(-1)[at] = ids
        self.num_computed[device_rows] = device_values
