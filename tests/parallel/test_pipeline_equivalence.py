"""The equivalence matrix over pipeline stages, with as many plans in flight: exactly the tokens of a naive recompute.

OCTAVO_FULL_MATRIX=1 runs every combination, otherwise one of seventeen, which meets all values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from octavo.config.engine import EngineConfig
from octavo.engine import Engine
from tests.engine.test_equivalence import Script, Wanted, naive_tokens, requests
from tests.support.ranks import Ranks
from tests.support.tiny import Naive, tiny_config, write_tiny

COMBINATIONS = list(
    product(
        ((1, 2), (1, 3), (2, 2)), ("full", "mixed"), (5, 48), ("tight", "ample"), (True, False), (0, 2), (1, 2), (2, 5)
    )
)
TAKEN = COMBINATIONS if os.environ.get("OCTAVO_FULL_MATRIX") else COMBINATIONS[::17]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Naive]]:
    found = {}
    for kind in ("full", "mixed"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = (folder, Naive(write_tiny(kind, folder)))
    return found


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[str, Ranks]]:
    made: dict[str, Ranks] = {}
    yield made
    for ranks in made.values():
        ranks.close()


def executor_for(executors: dict[str, Ranks], key: str, config: EngineConfig) -> Ranks:
    if key not in executors:
        executors[key] = Ranks(config)
        executors[key].load()
    return executors[key]


@pytest.mark.parametrize(("sizes", "kind", "budget", "pool", "prefix", "draft", "n", "seqs"), TAKEN)
def test_tokens_equal_a_naive_recompute(
    models: dict[str, tuple[Path, Naive]],
    executors: dict[str, Ranks],
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
    config = tiny_config(
        folder,
        tensor_parallel_size=sizes[0],
        pipeline_parallel_size=sizes[1],
        block_size=4,
        max_model_len=28,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        num_gpu_blocks_override=(1 + 8 * (1 if kind == "full" else 3)) if pool == "tight" else 200,
        enable_prefix_caching=prefix,
    )
    wanted = {(r.id, i): naive_tokens(naive, r, i) for r in requests(n) for i in range(n)}
    script = Script(wanted)
    executor = executor_for(executors, f"{sizes} {kind} {pool} {seqs}", config)
    engine = Engine(config, executor=executor, proposer=script if draft else None, max_draft=draft)
    for request in requests(n):
        engine.add(request)
    got: Wanted = {key: [] for key in wanted}
    most = 0
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            got[delta.request_id, delta.index] += delta.token_ids
        engine.scheduler.check()
        most = max(most, len(engine._ahead))
    assert got == wanted
    assert most == sizes[1] - 1, "plans in flight from turn to turn"
    assert engine.stats.kv_blocks_used == 0


def test_plans_in_flight_share_the_running_sequences(models: dict[str, tuple[Path, Naive]]) -> None:
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
