"""The embedded model, shared by three processes: 9 query heads and 3 KV heads, in a GGUF file's order of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.core.errors import ConfigError

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2-greedy.json").read_text())
TOKENS = 12
WIDE = 0.1
"""Gap of the two best logits that float32 sums in another order do not close."""


def test_three_ranks_generate_the_tokens_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    prompts = [p for p in RECORDED["prompts"] if min(p["gaps"][:TOKENS]) > WIDE]
    assert len(prompts) > 3
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    with LLM(
        dtype="float32", device="cpu", max_model_len=512, skip_tokenizer_init=True, tensor_parallel_size=3,
        kv_cache_memory_bytes=64 << 20,
    ) as llm:  # fmt: skip
        results = llm.generate([p["prompt_ids"] for p in prompts[:6]], params, use_tqdm=False)
    for prompt, result in zip(prompts, results, strict=False):
        assert list(result.outputs[0].token_ids) == prompt["tokens"][:TOKENS]


def test_two_ranks_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"tensor-parallel-size is 2, but 9 query heads.*this model works with 1, 3"):
        LLM(tensor_parallel_size=2)
