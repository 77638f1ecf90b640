"""The embedded model in float32 against tokens recorded from transformers."""

from __future__ import annotations

import json
from pathlib import Path

from octavo import LLM, SamplingParams

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2-greedy.json").read_text())
TIE = 0.01
"""Gap of the two best logits below which float32 arithmetic may go either way."""


def test_greedy_tokens_are_those_of_transformers() -> None:
    prompts = RECORDED["prompts"]
    llm = LLM(dtype="float32", device="cpu", max_model_len=1024, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    results = llm.generate([p["prompt_ids"] for p in prompts], params, use_tqdm=False)
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        got, wanted = list(result.outputs[0].token_ids), prompt["tokens"]
        parted = next((j for j, (g, w) in enumerate(zip(got, wanted, strict=True)) if g != w), None)
        if parted is not None:
            gap = prompt["gaps"][parted]
            assert gap < TIE, f"prompt {i} parts from transformers at token {parted}, where the gap is {gap}"
