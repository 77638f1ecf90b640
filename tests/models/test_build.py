"""What a model refuses, and its weights by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.core.errors import UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from tests.models.harness import Runner


def facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "path": "",
        "files": "none",
        "architecture": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 6,
        "max_position": 32,
        "norm_eps": 1e-5,
        "rope": RopeFacts(rotary_dim=4),
        "windows": (None, None),
    }
    return ModelFacts(**(values | changes))


def test_unknown_family_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="'gpt5'"):
        Runner(facts(architecture="gpt5"))


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"windows": (None, 4)}, "sliding window"),
        ("mistral", {"qkv_bias": True}, "qkv_bias"),
        ("qwen2", {"output_bias": True}, "output_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"num_heads": 3}, "3 query heads"),
    ],
)
def test_what_a_family_does_not_have_is_refused(architecture: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        Runner(facts(architecture=architecture, **changes))


def test_unknown_weight_is_refused_and_irrelevant_ones_ignored() -> None:
    model = Runner(facts(tie_embeddings=True)).model
    model.load_weight("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))
    model.load_weight("lm_head.weight", torch.ones(11, 8))  # tied: the embedding is the head
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        model.load_weight("model.layers.2.mlp.up_proj.weight", torch.ones(6, 8))
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        model.load_weight("model.layers.0.self_attn.q_proj.bias", torch.ones(16))


def test_wrong_shape_is_refused_with_both_shapes() -> None:
    model = Runner(facts()).model
    with pytest.raises(UnsupportedModel, match=r"k_proj\.weight.*\[8, 16\].*\[8, 8\]"):
        model.load_weight("model.layers.1.self_attn.k_proj.weight", torch.ones(8, 16))
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight.*\[1\].*\[8\]"):
        model.load_weight("model.norm.weight", torch.ones(1))


def test_missing_weights_are_listed() -> None:
    model = Runner(facts()).model
    with pytest.raises(UnsupportedModel, match=r"lacks 21 of .*lm_head\.weight"):
        model.finish_loading()


def test_weights_convert_to_the_models_dtype() -> None:
    model = Runner(facts(), dtype=torch.bfloat16).model
    model.load_weight("model.layers.1.self_attn.v_proj.weight", torch.full((8, 8), 1.001, dtype=torch.float64))
    qkv = dict(model.tensors())["blocks.1.attn.qkv.weight"]
    assert qkv.dtype == torch.bfloat16
    assert torch.equal(qkv[-8:], torch.ones(8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"architecture": "qwen3", "qk_norm": True},
    ],
)
def test_tensors_are_every_parameter_once(changes: dict[str, Any]) -> None:
    made = facts(**changes)
    tensors = dict(Runner(made).model.tensors())
    assert sum(t.numel() for t in tensors.values()) == made.num_parameters
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_dtype(dtype: torch.dtype) -> None:
    runner = Runner(facts(), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for _, tensor in runner.model.tensors():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    logits = runner.step({"a": [1, 2, 3]})["a"]
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    exact = Runner(facts(), dtype=torch.float64)
    for (_, low), (_, full) in zip(runner.model.tensors(), exact.model.tensors(), strict=True):
        full.copy_(low)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert (exact.step({"a": [1, 2, 3]})["a"] - logits).abs().max() < tolerance
