"""What the equivalence matrices have in common: models, requests, the tokens that they must get, and how they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.config.engine import EngineConfig
from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.core.sequence import Sequence
from octavo.engine import Engine
from octavo.engine.executor import Executor
from tests.support.tiny import VOCAB, Naive, tiny_config, write_tiny

Models = dict[str, tuple[Path, Naive]]
Tokens = dict[tuple[str, int], list[int]]
"""Of each request and choice."""


def write_models(folders: pytest.TempPathFactory) -> Models:
    """Both kinds of `tiny`."""
    return {kind: (folder := folders.mktemp(kind), Naive(write_tiny(kind, folder))) for kind in ("full", "mixed")}


def matrix_config(
    folder: Path, *, kind: str, budget: int, pool: str, prefix: bool, seqs: int, **changes: Any
) -> EngineConfig:
    """A "tight" pool holds one sequence of full length and little more."""
    return tiny_config(
        folder,
        block_size=4,
        max_model_len=28,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        num_gpu_blocks_override=(1 + 8 * (1 if kind == "full" else 3)) if pool == "tight" else 200,
        enable_prefix_caching=prefix,
        **changes,
    )


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


def naive_tokens(naive: Naive, n: int) -> Tokens:
    """What `requests(n)` must get."""
    return {(request.id, index): _naive(naive, request, index) for request in requests(n) for index in range(n)}


def _naive(naive: Naive, request: Request, index: int) -> list[int]:
    params = request.params
    assert params.max_tokens is not None
    assert params.seed is not None
    eos = None if params.ignore_eos else 0
    return naive.generate(request.prompt_token_ids, params.max_tokens, params.temperature, params.seed + index, eos)


def generate(engine: Engine, n: int, after_turn: Callable[[], None] = lambda: None) -> Tokens:
    """What `requests(n)` get; the scheduler's invariants hold after every turn, and no block stays in use."""
    for request in requests(n):
        engine.add(request)
    got: Tokens = {}
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            got.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        engine.scheduler.check()
        after_turn()
    assert engine.stats.kv_blocks_used == 0
    return got


class Script:
    """Drafts what is known to follow, spoilt at every third position."""

    def __init__(self, wanted: Tokens) -> None:
        self._wanted = wanted
        self.proposed = 0

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        at = seq.num_generated
        draft = self._wanted[seq.request.id, seq.index][at : at + limit]
        self.proposed += len(draft)
        return [(t + 1) % VOCAB if (at + i) % 3 == 0 else t for i, t in enumerate(draft)]


class Executors:
    """Loaded executors by what shapes them: loading each once keeps a matrix quick."""

    def __init__(self, make: Callable[[EngineConfig], Executor]) -> None:
        self._make = make
        self._made: dict[str, Executor] = {}

    def get(self, key: str, config: EngineConfig) -> Executor:
        if key not in self._made:
            self._made[key] = self._make(config)
            self._made[key].load()
        return self._made[key]

    def close(self) -> None:
        for executor in self._made.values():
            executor.close()
