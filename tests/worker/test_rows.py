"""Rows' state on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from octavo.core.plan import Plan
from octavo.kernels import load
from octavo.worker.rows import RowState
from octavo.worker.staging import Uploader


class CountingUploader(Uploader):
    calls = 0

    def __call__(self, *arrays: Any) -> list[torch.Tensor]:
        self.calls += 1
        return super().__call__(*arrays)


def plan(blocks: list[tuple[int, int, int, list[int]]], rewind: list[tuple[int, int]]) -> Plan:
    none = np.zeros(0, np.int32)
    return Plan(1, [], [], rewind, blocks, np.arange(2, dtype=np.int32), 2, 0, 2, none, none)


def test_a_step_uploads_only_what_changed() -> None:
    device = torch.device("cpu")
    upload = CountingUploader(device)
    state = RowState(3, 8, 2, load("cpu"), device)
    state.apply(plan([], []), upload)
    assert upload.calls == 0
    state.apply(plan([(1, 1, 2, [5, 6]), (2, 0, 0, [7])], [(2, 9)]), upload)
    assert upload.calls == 1
    assert state.tables[1, 1].tolist() == [0, 0, 5, 6, 0, 0, 0, 0]
    assert state.tables[0, 2].tolist() == [7, 0, 0, 0, 0, 0, 0, 0]
    assert (int(state.tables.sum()), state.num_computed.tolist()) == (18, [0, 0, 9, 0])
    assert state.host_computed.tolist() == [0, 0, 9, 0]
