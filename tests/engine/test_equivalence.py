"""The equivalence matrix: a float64 model gives exactly the tokens of a naive recompute, however the engine runs it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from octavo.config.engine import EngineConfig
from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.core.sequence import Sequence
from octavo.engine import Engine, InlineExecutor
from tests.support.tiny import VOCAB, Naive, tiny_config, write_tiny

Wanted = dict[tuple[str, int], list[int]]
COMBINATIONS = list(
    product(("full", "mixed"), (5, 48), ("tight", "ample"), (True, False), (0, 1), (0, 2), (1, 2), (2, 5))
)


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


def requests(n: int) -> list[Request]:
    shared = [7, 3, 9, 1, 4, 4, 8, 2, 6]
    prompts = [[*shared, 5, 5], [5], shared[:8], [*shared, 10, 11, 12, 13, 14, 15], [1, 2, 3], [*shared, 10]]
    return [
        Request(
            str(i),
            prompt,
            SamplingParams(n=n, temperature=i % 2 * 0.8, seed=i, max_tokens=4 + 3 * (i % 3), ignore_eos=i % 3 == 0),
            0.0,
            whole=i % 3 != 1,
        )
        for i, prompt in enumerate(prompts)
    ]


def naive_tokens(naive: Naive, request: Request, index: int) -> list[int]:
    params = request.params
    assert params.max_tokens is not None
    assert params.seed is not None
    eos = None if params.ignore_eos else 0
    return naive.generate(request.prompt_token_ids, params.max_tokens, params.temperature, params.seed + index, eos)


class Script:
    """Drafts what is known to follow, spoilt at every third position."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.proposed = 0

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        at = seq.num_generated
        draft = self._wanted[seq.request.id, seq.index][at : at + limit]
        self.proposed += len(draft)
        return [(t + 1) % VOCAB if (at + i) % 3 == 0 else t for i, t in enumerate(draft)]


_executors: dict[str, InlineExecutor] = {}


def executor_for(key: str, config: EngineConfig) -> InlineExecutor:
    """A loaded executor; loading once per shape of the pool keeps the matrix quick."""
    if key not in _executors:
        _executors[key] = InlineExecutor(config)
        _executors[key].load()
    return _executors[key]


@pytest.mark.parametrize(("kind", "budget", "pool", "prefix", "overlap", "draft", "n", "seqs"), COMBINATIONS)
def test_tokens_equal_a_naive_recompute(
    models: dict[str, tuple[Path, Naive]],
    kind: str,
    budget: int,
    pool: str,
    prefix: bool,
    overlap: int,
    draft: int,
    n: int,
    seqs: int,
) -> None:
    folder, naive = models[kind]
    config = tiny_config(
        folder,
        block_size=4,
        max_model_len=28,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        num_gpu_blocks_override=(1 + 8 * (1 if kind == "full" else 3)) if pool == "tight" else 200,
        enable_prefix_caching=prefix,
        overlap=overlap,
    )
    wanted = {(r.id, i): naive_tokens(naive, r, i) for r in requests(n) for i in range(n)}
    script = Script(wanted)
    engine = Engine(
        config,
        executor=executor_for(f"{kind} {pool} {seqs}", config),
        proposer=script if draft else None,
        max_draft=draft,
    )
    for request in requests(n):
        engine.add(request)
    got: Wanted = {key: [] for key in wanted}
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            got[delta.request_id, delta.index] += delta.token_ids
        engine.scheduler.check()
    assert got == wanted
    assert bool(script.proposed) == bool(draft)
    assert engine.stats.kv_blocks_used == 0
