"""Recorded decode steps change no token of the engine, while rows join, leave and are preempted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.engine import Engine, InlineExecutor
from octavo.kernels.cpu import build
from octavo.worker import Worker
from tests.support.tiny import VOCAB, tiny_config, write_tiny

pytestmark = pytest.mark.skipif(build.available() is not None, reason="needs a C compiler")


def requests(seed: int) -> list[Request]:
    """Of different lengths, some greedy, some with a penalty, which draws outside of the record."""
    torch.manual_seed(seed)
    found = []
    for i in range(14):
        prompt = torch.randint(1, VOCAB, (int(torch.randint(1, 12, ())),)).tolist()
        params = SamplingParams(
            n=1 + (i % 5 == 4),
            temperature=i % 3 * 0.6,
            top_p=1 - i % 2 * 0.2,
            seed=i,
            max_tokens=5 + 3 * (i % 5),
            ignore_eos=i % 4 > 0,
            presence_penalty=0.7 * (i == 9),
            logprobs=2 if i == 11 else None,
        )
        found.append(Request(str(i), prompt, params, 0.0))
    return found


def run(
    folder: Path, kind: str, dtype: str, overlap: int, *, record: bool
) -> tuple[dict[tuple[str, int], list[int]], int]:
    config = tiny_config(
        folder,
        dtype=dtype,
        block_size=4,
        max_model_len=32,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        num_gpu_blocks_override=14 if kind == "full" else 30,
        overlap=overlap,
    )
    worker = Worker(config)
    worker.load()
    decode = worker._decode
    assert decode is not None
    if not record:
        worker._decode = None
    engine = Engine(config, executor=InlineExecutor(config, worker))
    waiting, found = requests(3), dict[tuple[str, int], list[int]]()
    turn = 0
    while waiting or engine.has_work():
        if waiting and turn % 3 == 0:
            engine.add(waiting.pop())
        turn += 1
        for delta in engine.step():
            assert delta.error is None
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        engine.scheduler.check()
    assert bool(decode._steps) == record
    assert None not in decode._steps.values()
    assert bool(decode._draws) == record
    return found, engine.stats.preemptions


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_records_change_no_token(kind: str, dtype: str, overlap: int, tmp_path: Path) -> None:
    write_tiny(kind, tmp_path)
    found, preempted = run(tmp_path, kind, dtype, overlap, record=True)
    assert found == run(tmp_path, kind, dtype, overlap, record=False)[0]
    assert preempted > 0
    assert len(found) == 16
