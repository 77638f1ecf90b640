"""Bookkeeping for state that only some rows have: dense slots on the device, ragged entries on the host.

Knows rows and arrays; knows nothing of what they mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int32]
Array = NDArray[Any]


def upload(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class Slots:
    """Gives rows places in dense tensors that are no larger than the rows in use need."""

    def __init__(self, max_rows: int) -> None:
        self._slot_of = np.full(max_rows + 1, -1, np.int64)
        self._free: list[int] = []
        self.size = 0
        """Places that exist, used or free."""

    def __len__(self) -> int:
        return self.size - len(self._free)

    def take(self, row: int) -> int:
        if not self._free:
            self._free.append(self.size)
            self.size += 1
        self._slot_of[row] = slot = self._free.pop()
        return slot

    def release(self, row: int) -> None:
        """Does nothing for a row without a place."""
        if self._slot_of[row] >= 0:
            self._free.append(int(self._slot_of[row]))
            self._slot_of[row] = -1
        if not len(self):
            self._free, self.size = [], 0

    def find(self, rows: Rows) -> tuple[Array, Array]:
        """Indices into `rows` of those with a place, and their places; both int64."""
        slots = self._slot_of[rows]
        at = np.nonzero(slots >= 0)[0]
        return at, slots[at]


class Entries:
    """Ragged lists per row, packed for the rows of a step and kept while those stay the same.

    A row has one or more parallel arrays of the same length; two-dimensional ones may differ in width between rows and
    are then padded with -1 on the left.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._device = device
        self._columns: dict[int, tuple[Array, ...]] = {}
        self._has = np.zeros(max_rows + 1, np.bool_)
        self._key: bytes | None = None
        self._packed: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self._columns)

    def set(self, row: int, *columns: Array) -> None:
        self._columns[row], self._has[row], self._key = columns, True, None

    def drop(self, row: int) -> None:
        """Does nothing for a row without entries."""
        if self._columns.pop(row, None) is not None:
            self._has[row], self._key, self._packed = False, None, ()

    def pack(self, rows: Rows) -> tuple[Tensor, ...]:
        """The entries of a step's rows: `lines` (indices into `rows` that have any), `at` (for each entry its line),
        then the columns; nothing at all when no row has entries.
        """
        key = rows.tobytes()
        if key != self._key:
            lines = np.nonzero(self._has[rows])[0]
            found = [self._columns[int(row)] for row in rows[lines]]
            at = np.repeat(lines, [len(columns[0]) for columns in found])
            columns = [_joined(list(parts)) for parts in zip(*found, strict=True)]
            self._key = key
            self._packed = tuple(upload(a, self._device) for a in (lines, at, *columns)) if found else ()
        return self._packed


def _joined(parts: list[Array]) -> Array:
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (width - part.shape[1], 0)), constant_values=-1) for part in parts]
    return np.concatenate(parts)
