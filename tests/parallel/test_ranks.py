"""Ranks that share a model generate what one rank alone does: every family, split by heads and by layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.engine import Engine, InlineExecutor
from octavo.engine.executor import Executor
from tests.models.harness import randomize
from tests.models.test_families import CASES, TINY
from tests.support.ranks import Ranks
from tests.support.tiny import tiny_config

transformers = pytest.importorskip("transformers")

SIZES = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=CASES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, prefix, options, _ = CASES[request.param]
    shape = TINY | options | {"vocab_size": 95, "bos_token_id": None, "eos_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(**shape)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).double()
    randomize(model)
    path = tmp_path_factory.mktemp(request.param)
    model.config.save_pretrained(path)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, path / "model.safetensors")
    return path


def generate(executor: Executor, config: Any) -> dict[tuple[str, int], list[int]]:
    engine = Engine(config, executor=executor)
    engine.load()
    shared = [7, 3, 9, 1, 4, 4, 8, 2, 6]
    for i, prompt in enumerate(([*shared, 5, 5], [5], shared[:8], [*shared, 10, 11, 12, 13])):
        params = SamplingParams(temperature=i % 2 * 0.8, seed=i, max_tokens=6 + i, ignore_eos=True)
        engine.add(Request(str(i), prompt, params, 0.0))
    rich = SamplingParams(
        n=2,
        seed=9,
        max_tokens=7,
        frequency_penalty=0.5,
        logprobs=2,
        prompt_logprobs=1,
        bad_words=["x"],
        ignore_eos=True,
    )
    engine.add(Request("rich", shared, rich, 0.0, bad_word_ids=[[4]]))
    got: dict[tuple[str, int], list[int]] = {}
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            key = (delta.request_id, delta.index)
            got.setdefault(key, []).extend(delta.token_ids)
            for entry in [*(delta.logprobs or ()), *(delta.prompt_logprobs or ())]:
                if entry is not None:
                    got[key] += entry.token_ids
    engine.close()
    return got


def test_tokens_equal_those_of_one_rank(folder: Path) -> None:
    options = {"block_size": 4, "max_model_len": 40, "max_num_batched_tokens": 12, "num_gpu_blocks_override": 100}
    alone = tiny_config(folder, **options)
    wanted = generate(InlineExecutor(alone), alone)
    for tensor, pipeline in SIZES:
        config = tiny_config(folder, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, **options)
        ranks = Ranks(config)
        assert generate(ranks, config) == wanted, f"{tensor} x {pipeline}"
        ranks.close()
