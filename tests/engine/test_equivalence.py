"""The equivalence matrix: a float64 model gives exactly the tokens of a naive recompute, however the engine runs it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from octavo.engine import Engine, InlineExecutor
from tests.support.equivalence import Executors, Models, Script, generate, matrix_config, naive_tokens, write_models

COMBINATIONS = list(
    product(("full", "mixed"), (5, 48), ("tight", "ample"), (True, False), (0, 1), (0, 2), (1, 2), (2, 5))
)
EXECUTORS = Executors(InlineExecutor)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "budget", "pool", "prefix", "overlap", "draft", "n", "seqs"), COMBINATIONS)
def test_tokens_equal_a_naive_recompute(
    models: Models, kind: str, budget: int, pool: str, prefix: bool, overlap: int, draft: int, n: int, seqs: int
) -> None:
    folder, naive = models[kind]
    config = matrix_config(folder, kind=kind, budget=budget, pool=pool, prefix=prefix, seqs=seqs, overlap=overlap)
    wanted = naive_tokens(naive, n)
    script = Script(wanted)
    executor = EXECUTORS.get(f"{kind} {pool} {seqs}", config)
    engine = Engine(config, executor=executor, proposer=script if draft else None, max_draft=draft)
    assert generate(engine, n) == wanted
    assert bool(script.proposed) == bool(draft)
