"""Every rope scaling through a whole model, below and beyond the original context."""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from octavo.core.facts import RopeFacts
from tests.models.harness import Runner, assert_close, facts_for, randomize

transformers = pytest.importorskip("transformers")

ORIGINAL = 16
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, {"factor": 3.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": ORIGINAL},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        {"factor": 4.0, "original_max_position": ORIGINAL},
    ),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        {
            "factor": 4.0,
            "original_max_position": ORIGINAL,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": 1.5,
        },
        {"factor": 4.0, "original_max_position": ORIGINAL, "attention_factor": 1.5},
    ),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0, "original_max_position": ORIGINAL}),
}


def models(case: str) -> tuple[Runner, Any]:
    scaling, facts = CASES[case]
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=ORIGINAL if case == "dynamic" else 64,
        rope_parameters={"rope_theta": 1000.0} | scaling,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomize(model)
    kind = case.split("-")[0]
    rope = msgspec.convert({"theta": 1000.0, "rotary_dim": 32, "kind": kind} | facts, RopeFacts)
    return Runner(facts_for(config, "llama", rope=rope)).load(model.state_dict()), model


@torch.no_grad()
def one_by_one(model: Any, ids: list[int]) -> Tensor:
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # before transformers 5.24
    past = {name: transformers.DynamicCache(config=model.config)}
    return torch.stack([model(torch.tensor([[i]]), **past, use_cache=True).logits[0, 0] for i in ids])


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    runner, model = models(case)
    ids = [(7 * i + 3) % 96 for i in range(40)]
    expected = one_by_one(model, ids)
    assert_close(runner.step({"whole": ids})["whole"], expected)
    cuts = [0, 9, 22, *range(23, 41)]
    parts = [runner.step({"parts": ids[i:j]})["parts"] for i, j in pairwise(cuts)]
    assert_close(torch.cat(parts), expected)


def test_dynamic_is_unscaled_within_the_original_context() -> None:
    runner, model = models("dynamic")
    ids = [(5 * i + 1) % 96 for i in range(ORIGINAL)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert_close(runner.step({"a": ids})["a"], expected)


@pytest.mark.parametrize("case", [c for c in CASES if c != "dynamic"])
def test_scaling_changes_the_logits(case: str) -> None:
    """The cases above would prove nothing if the scaling were too weak to show."""
    scaled, model = models(case)
    config = model.config.to_dict() | {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    plain.load_state_dict(model.state_dict())
    ids = [(7 * i + 3) % 96 for i in range(40)]
    with torch.no_grad():
        unscaled = plain(torch.tensor([ids])).logits[0]
    assert (scaled.step({"a": ids})["a"] - unscaled).abs().max() > 0.01
