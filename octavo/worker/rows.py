"""Device-resident state of running sequences, one row each, changed only by what plans say.

Row `max_rows` is the padding row: it exists, holds neutral values and is never given to a sequence. Sampling keeps its
own state per row (`octavo.sampling`).
"""

from __future__ import annotations

import numpy as np
import torch

from octavo.core.plan import Plan


class RowState:
    """last_token, num_computed: [R+1] int64; tables: per KV group [R+1, max_blocks] int32 block ids."""

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int, device: torch.device) -> None:
        self.last_token = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.tables = tuple(
            torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=device) for _ in range(num_groups)
        )
        self.host_computed = np.zeros(max_rows + 1, np.int64)
        """Mirror of num_computed; rows with drafts are corrected by the plan's `rewind` before they run again."""

    def apply(self, plan: Plan) -> None:
        """Admissions, rewinds and new blocks."""
        changed = [(admit.row, admit.num_computed) for admit in plan.admit] + list(plan.rewind)
        if changed:
            rows, values = np.array(changed, np.int64).T
            self.host_computed[rows] = values
            self.num_computed[torch.from_numpy(rows).to(self.num_computed.device)] = torch.from_numpy(values).to(
                self.num_computed.device
            )
        for group, table in enumerate(self.tables):
            new = [(row, first, ids) for row, g, first, ids in plan.blocks if g == group]
            if new:
                rows = np.repeat(np.array([n[0] for n in new]), [len(n[2]) for n in new])
                columns = np.concatenate([np.arange(first, first + len(ids)) for _, first, ids in new])
                blocks = np.concatenate([np.array(ids, np.int32) for _, _, ids in new])
                at = (torch.from_numpy(rows).to(table.device), torch.from_numpy(columns).to(table.device))
                table[at] = torch.from_numpy(blocks).to(table.device)
