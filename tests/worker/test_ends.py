"""The last layer goes on with what is sampled alone: the same logits, from fewer rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.engine import Engine
from octavo.worker.layout import Layout
from tests.support.tiny import SHAPE, tiny_config

WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MODELS = [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE | WINDOW), Qwen3Config(**SHAPE | {"head_dim": 24})]


def run(folder: Path, dtype: str, **params: Any) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Logits of each step, and how many rows the first and the last layer's MLP had in it."""
    config = tiny_config(
        folder, load_format="dummy", dtype=dtype, max_model_len=60, max_num_seqs=4, max_num_batched_tokens=16,
        num_gpu_blocks_override=60, overlap=0,
    )  # fmt: skip
    engine: Any = Engine(config)
    engine.load()
    worker = engine._executor._worker
    logits, rows, blocks = list[Tensor](), list[tuple[int, int]](), list(worker._model.blocks.values())
    forward, counts = worker.forward, [0, 0]

    def watch(i: int, mlp: Any) -> Any:
        def watched(norm: Any, partial: Tensor, stream: Any) -> Any:
            counts[i] = len(partial)
            return mlp(norm, partial, stream)

        return watched

    def kept(plan: Any) -> Any:
        made = forward(plan)
        logits.append(made.logits.clone())
        rows.append((counts[0], counts[1]))
        return made

    worker.forward = kept
    for i, block in enumerate((blocks[0], blocks[-1])):
        block.mlp = watch(i, block.mlp)
    for i, length in enumerate((41, 3, 22)):
        given = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0, **params)
        engine.add(Request(str(i), [3 + (7 * i + j) % 20 for j in range(length)], given, 0.0))
    while engine.has_work():
        engine.step()
    engine.close()
    return logits, rows


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_the_last_layer_computes_what_is_sampled(
    config: PretrainedConfig, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    few, rows = run(tmp_path, dtype)
    monkeypatch.setattr(Layout, "ends", None)
    every, all_rows = run(tmp_path, dtype)
    assert len(few) == len(every)
    for one, other in zip(few, every, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(first == last for first, last in all_rows)
    assert rows[:3] == [(16, 1), (16, 1), (16, 2)], "a chunk in the middle keeps its last token, for nothing"
    assert [first for first, _ in rows] == [first for first, _ in all_rows]


def test_prompt_logprobs_need_every_token(tmp_path: Path) -> None:
    config = MODELS[0]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert all(first == last for first, last in run(tmp_path, "float32", prompt_logprobs=1)[1])
