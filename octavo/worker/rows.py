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
from octavo.kernels import Kernels
from octavo.worker.staging import Uploader


def longest_first(lengths: NDArray[Any]) -> NDArray[np.int32]:
    """Indices of rows of these lengths in the order that leaves no long row for the end."""
    return np.argsort(-lengths, kind="stable").astype(np.int32)


class RowState:
    """last_token, num_computed: [R+1] int64; tables: [G, R+1, max_blocks] int32 block ids, per KV group."""

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int, kernels: Kernels, device: torch.device) -> None:
        self._kernels = kernels
        self.last_token = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_groups, max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self.host_computed = np.zeros(max_rows + 1, np.int64)
        """Mirror of num_computed; rows with drafts are corrected by the plan's `rewind` before they run again."""

    def apply(self, plan: Plan, upload: Uploader) -> None:
        """Admissions, rewinds and new blocks."""
        changed = [(admit.row, admit.num_computed) for admit in plan.admit] + plan.rewind
        if not changed and not plan.blocks:
            return
        rows, values = np.array(changed, np.int64).reshape(-1, 2).T
        self.host_computed[rows] = values
        _, lines, width = self.tables.shape
        places: list[int] = []
        blocks: list[int] = []
        for row, group, first, ids in plan.blocks:
            begin = (group * lines + row) * width + first
            places += range(begin, begin + len(ids))
            blocks += ids
        at, new, changed_rows, new_values = upload(np.array(places, np.int64), np.array(blocks, np.int32), rows, values)
        self._kernels.apply_diffs(self.tables, at, new, self.num_computed, changed_rows, new_values)
