"""Helpers: a sampler of the reference kernels, and admissions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from octavo.core.params import SamplingParams
from octavo.core.plan import Admit
from octavo.kernels import reference
from octavo.sampling import Sampler

VOCAB, MAX_ROWS, EOS = 40, 6, (3, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(VOCAB, MAX_ROWS, EOS, reference, torch.device("cpu"))


@pytest.fixture
def admit() -> Callable[..., Admit]:
    def make(
        row: int, *, prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 7, **given: Any
    ) -> Admit:
        bad: list[list[int]] = given.pop("bad_word_ids", [])
        if bad:
            given["bad_words"] = ["x"] * len(bad)
        params = SamplingParams(**{"temperature": 0.0, **given})
        prompt, output = prompt or [1, 2], output or []
        history = prompt + output if params.uses_history else None
        return Admit(row, params, seed, len(prompt), len(prompt + output), 0, history, bad)

    return make


@pytest.fixture
def run(sampler: Sampler) -> Callable[..., torch.Tensor]:
    """Samples `logits` for `rows` at `positions` and returns the logits as the transforms left them."""

    def call(logits: torch.Tensor, rows: list[int], positions: list[int] | None = None) -> torch.Tensor:
        changed = logits.clone()
        where = torch.tensor(positions or [2] * len(rows))
        sampler(changed, np.array(rows, np.int32), where)
        return changed

    return call
