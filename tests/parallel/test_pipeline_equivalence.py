"""The equivalence matrix over pipeline stages, with as many plans in flight: exactly the tokens of a naive recompute.

OCTAVO_FULL_MATRIX=1 runs every combination, otherwise one of seventeen, which meets all values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch

from octavo.engine import Engine
from tests.support.equivalence import (
    Executors,
    Models,
    Script,
    generate,
    matrix_config,
    naive_tokens,
    requests,
    write_models,
)
from tests.support.ranks import Ranks
from tests.support.tiny import tiny_config

COMBINATIONS = list(
    product(
        ((1, 2), (1, 3), (2, 2)), ("full", "mixed"), (5, 48), ("tight", "ample"), (True, False), (0, 2), (1, 2), (2, 5)
    )
)
TAKEN = COMBINATIONS if os.environ.get("OCTAVO_FULL_MATRIX") else COMBINATIONS[::17]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def executors() -> Iterator[Executors]:
    made = Executors(Ranks)
    yield made
    made.close()


@pytest.mark.parametrize(("sizes", "kind", "budget", "pool", "prefix", "draft", "n", "seqs"), TAKEN)
def test_tokens_equal_a_naive_recompute(
    models: Models,
    executors: Executors,
    sizes: tuple[int, int],
    kind: str,
    budget: int,
    pool: str,
    prefix: bool,
    draft: int,
    n: int,
    seqs: int,
) -> None:
    folder, naive = models[kind]
    ranks = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}
    config = matrix_config(folder, kind=kind, budget=budget, pool=pool, prefix=prefix, seqs=seqs, **ranks)
    wanted = naive_tokens(naive, n)
    executor = executors.get(f"{sizes} {kind} {pool} {seqs}", config)
    engine = Engine(config, executor=executor, proposer=Script(wanted) if draft else None, max_draft=draft)
    in_flight: list[int] = []
    assert generate(engine, n, lambda: in_flight.append(len(engine._ahead))) == wanted
    assert max(in_flight) == sizes[1] - 1, "plans in flight from turn to turn"


def test_plans_in_flight_share_the_running_sequences(models: Models) -> None:
    config = tiny_config(models["full"][0], pipeline_parallel_size=3, max_num_seqs=8, num_gpu_blocks_override=100)
    engine = Engine(config, executor=(ranks := Ranks(config)))
    engine.load()
    plans = []
    launch = ranks.launch
    ranks.launch = lambda plan: plans.append(plan) or launch(plan)  # type: ignore[method-assign,func-returns-value]
    for request in requests(1):
        engine.add(request)
    while engine.has_work():
        engine.step()
    decodes = [plan for plan in plans if plan.num_decode]
    assert len(decodes) > 6
    assert max(plan.num_decode for plan in decodes) == 2  # of six running
    for earlier, later in pairwise(decodes):
        if earlier.num_decode + later.num_decode == 4:
            assert not set(earlier.rows) & set(later.rows)
    ranks.close()
