"""Each family against transformers: logits over every way in which a sequence can be computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.harness import Runner, assert_close, facts_for, randomize

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
WINDOW = {"sliding_window": 7}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}, {}),
    "llama-tied-mha": ("llama", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    "llama-one-kv-head": ("llama", "Llama", {"num_key_value_heads": 1, "head_dim": 16}, {}),
    "llama-biases": (
        "llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", "Mistral", {"sliding_window": None}, {}),
    "mistral-window": ("mistral", "Mistral", WINDOW, {}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True}),
    "qwen2-window": ("qwen2", "Qwen2", QWEN_WINDOW, {"qkv_bias": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}, {"qk_norm": True}),
    "qwen3-window-biases": (
        "qwen3",
        "Qwen3",
        QWEN_WINDOW | {"head_dim": 16, "attention_bias": True, "max_window_layers": 2},
        {"qk_norm": True, "qkv_bias": True, "output_bias": True},
    ),
}


@pytest.fixture(params=CASES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Callable[[], Runner], Any]:
    """(a fresh runner, the transformers model), with equal weights."""
    architecture, prefix, options, facts = CASES[request.param]
    config = getattr(transformers, f"{prefix}Config")(**(TINY | options))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    randomize(model)
    return lambda: Runner(facts_for(config, architecture, **facts)).load(model.state_dict()), model


def tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, 96, (count,), generator=generator)]


@torch.no_grad()
def oracle(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    assert logits.std() > 0.3, "the weights are too small for a difference to show"
    return logits


def test_whole_prompt(family: tuple[Callable[[], Runner], Any]) -> None:
    new, model = family
    ids = tokens(30)
    assert_close(new().step({"a": ids})["a"], oracle(model, ids))


def test_chunks_then_single_tokens(family: tuple[Callable[[], Runner], Any]) -> None:
    new, model = family
    runner, ids = new(), tokens(30)
    cuts = [0, 5, 6, 18, *range(19, 31)]
    parts = [runner.step({"a": ids[i:j]})["a"] for i, j in pairwise(cuts)]
    assert_close(torch.cat(parts), oracle(model, ids))


def test_rows_of_one_batch_do_not_mix(family: tuple[Callable[[], Runner], Any]) -> None:
    new, model = family
    runner = new()
    ids = {name: tokens(40, seed) for seed, name in enumerate("abcd")}
    got: dict[str, list[Tensor]] = {name: [] for name in ids}
    done = dict.fromkeys(ids, 0)
    # one long row, one short, one chunked beside decodes, one that joins late
    plan = [{"a": 25}, {"a": 1, "b": 3}, {"a": 1, "b": 1, "c": 9}, {"b": 1, "c": 8, "a": 1}, {"a": 1, "b": 1, "c": 1}]
    plan += [{"a": 1, "d": 12, "b": 1, "c": 2}] + [{"a": 1, "b": 1, "c": 1, "d": 1}] * 6
    for counts in plan:
        feed = {name: ids[name][done[name] : done[name] + count] for name, count in counts.items()}
        for name, logits in runner.step(feed).items():
            got[name].append(logits)
            done[name] += counts[name]
    for name, parts in got.items():
        assert_close(torch.cat(parts), oracle(model, ids[name][: done[name]]))


def test_shared_prefix_blocks(family: tuple[Callable[[], Runner], Any]) -> None:
    new, model = family
    runner, ids = new(), tokens(20)
    runner.step({"a": ids})
    other = ids[:16] + tokens(9, seed=5)
    runner.share("a", "b", 16)
    both = runner.step({"b": other[16:], "a": [7]})
    assert_close(both["b"], oracle(model, other)[16:])
    assert_close(both["a"], oracle(model, [*ids, 7])[20:])
