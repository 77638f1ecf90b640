"""Recorded decode steps on a CPU: bit for bit what the same step gives without a record, whatever the state."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from octavo.core.params import SamplingParams
from octavo.core.plan import Admit
from octavo.kernels.cpu import build
from octavo.kernels.cpu import threads as cpu_threads
from octavo.worker import Worker
from octavo.worker.decode import DecodeSteps
from tests.support.tiny import SHAPE, tiny_config

pytestmark = pytest.mark.skipif(build.available() is not None, reason="needs a C compiler")

ROWS, BLOCK, LENGTH = 70, 4, 60
SHAPES: dict[str, Any] = SHAPE | {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MODELS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "grouped heads": (LlamaConfig(**SHAPES), {"dtype": "float32"}),
    "bfloat16": (LlamaConfig(**SHAPES), {"dtype": "bfloat16"}),
    "tied, all biases": (
        LlamaConfig(**SHAPES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        {"dtype": "float32"},
    ),
    "windows in some layers": (Qwen2Config(**SHAPES | WINDOW), {"dtype": "bfloat16"}),
    "window in all layers": (MistralConfig(**SHAPES | {"sliding_window": 9}), {"dtype": "float32"}),
    "normalised heads": (Qwen3Config(**SHAPES | {"head_dim": 24}), {"dtype": "float32"}),
    "int8": (Qwen3Config(**SHAPES | {"head_dim": 16}), {"dtype": "bfloat16", "quantization": "int8"}),
}


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """More than there may be cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_threads, "set_up", lambda *_: torch.set_num_threads(request.param))
    yield
    torch.set_num_threads(before)


def worker(config: PretrainedConfig, folder: Path, *, record: bool, **changes: Any) -> Worker:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    if "quantization" in changes:  # which random weights are not made for
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
        changes["load_format"] = "safetensors"
    given = {"load_format": "dummy", "block_size": BLOCK, "max_model_len": LENGTH, "max_num_seqs": ROWS}
    made = Worker(tiny_config(folder, **given | {"num_gpu_blocks_override": 4000} | changes), record=record)
    made.load()
    return made


def scatter(made: Worker, seed: int) -> None:
    """Random sequences in all rows: lengths, blocks, keys and values, sampling parameters."""
    torch.manual_seed(seed)
    state = made._rows
    state.num_computed[:ROWS] = torch.randint(0, LENGTH - 8, (ROWS,))
    state.last_token[:ROWS] = torch.randint(0, 97, (ROWS,))
    blocks = torch.randperm(3999)[: state.tables[:, :ROWS].numel()] + 1
    state.tables[:, :ROWS] = blocks.view(state.tables[:, :ROWS].shape).int()
    for cache in {id(cache): cache for cache in made._kv}.values():
        cache.k.normal_()
        cache.v.normal_()
    for row in range(ROWS):
        params = SamplingParams(temperature=row % 3 * 0.7, top_k=row % 5, top_p=1 - row % 2 * 0.3)
        made._sampler.add(Admit(row, params, row, 0, 1, 1))


def step(decode: DecodeSteps, rows: np.ndarray[Any, np.dtype[np.int32]]) -> list[Tensor]:
    decoded = decode.run(rows)
    assert decoded is not None
    logits, positions = decoded.logits.clone(), decoded.positions.clone()
    tokens = decode.draw(rows)
    if tokens is None:  # the step was not recorded
        decode._sampler.refresh()
        tokens = decode._draw(logits, len(rows), filtered=True)
    return [logits, positions, tokens.clone()]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_recorded_step_equals_the_same_step_bit_for_bit(name: str, tmp_path: Path) -> None:
    config, changes = MODELS[name]
    recorded, eager = (worker(config, tmp_path, record=record, **changes) for record in (True, False))
    assert recorded._decode is not None
    assert eager._decode is not None
    rng = np.random.default_rng(0)
    for seed in range(3):
        scatter(recorded, seed)
        scatter(eager, seed)
        rows = rng.permutation(ROWS).astype(np.int32)
        for size in (1, 3, 8, 1, 17, 3):  # rows stay, leave, come and change places
            chosen = np.sort(rng.permutation(rows)[:size]) if seed else rows[:size]
            for found, wanted in zip(step(recorded._decode, chosen), step(eager._decode, chosen), strict=True):
                assert not found.isnan().any()
                assert torch.equal(found, wanted[: len(found)])
            for state in ("num_computed", "last_token"):
                mine, other = getattr(recorded._rows, state), getattr(eager._rows, state)
                assert torch.equal(mine[:ROWS], other[:ROWS])
        for written, wanted_there in zip(recorded._kv, eager._kv, strict=True):
            assert torch.equal(written.k[1:], wanted_there.k[1:])
            assert torch.equal(written.v[1:], wanted_there.v[1:])
    assert all(decode is not None for decode in recorded._decode._steps.values())
    assert len(recorded._decode._steps) == 4


@torch.inference_mode()
def test_many_rows_are_padded(tmp_path: Path) -> None:
    made = worker(LlamaConfig(**SHAPES), tmp_path, record=True, dtype="float32")
    assert made._decode is not None
    scatter(made, 0)
    before = made._rows.num_computed.clone()
    logits = step(made._decode, np.arange(66, dtype=np.int32))[0].clone()
    assert made._decode._size(66) == 80
    grown = made._rows.num_computed - before
    assert grown[:66].eq(1).all()
    assert grown[66:].eq(0).all()
    scatter(made, 0)
    torch.testing.assert_close(step(made._decode, np.arange(64, dtype=np.int32))[0], logits[:64])


@torch.inference_mode()
def test_a_step_that_cannot_be_recorded_is_left_to_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frequencies that depend on the position are computed by torch."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = LlamaConfig(**SHAPES | {"rope_parameters": rope, "max_position_embeddings": 16})
    made = worker(config, tmp_path, record=True, dtype="float32")
    assert made._decode is not None
    scatter(made, 0)
    before = made._rows.num_computed.clone()
    with caplog.at_level(logging.INFO, "octavo"):
        for size in (2, 3, 2):
            assert made._decode.run(np.arange(size, dtype=np.int32)) is None
            assert made._decode.draw(np.arange(size, dtype=np.int32)) is None
    assert torch.equal(made._rows.num_computed, before)
    assert [record.message for record in caplog.records if "not recorded" in record.message] == [
        "decode steps are not recorded, so Python slows each of them: aten.add.Tensor computes, and is no kernel"
    ]


@torch.inference_mode()
def test_warming_up_records_every_size_and_changes_no_row(tmp_path: Path) -> None:
    made = worker(LlamaConfig(**SHAPES), tmp_path, record=True, dtype="bfloat16")
    assert made._decode is not None
    scatter(made, 0)
    state = made._rows
    before = [t[..., :ROWS].clone() for t in (state.num_computed, state.last_token)]
    made.warm_up()
    assert sorted(made._decode._steps) == [*range(1, 65), 80]
    assert None not in made._decode._steps.values()
    assert all(
        torch.equal(a, b) for a, b in zip(before, (state.num_computed[:ROWS], state.last_token[:ROWS]), strict=True)
    )
