"""Tiny random models on disk, and what they generate without any cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from octavo.config import EngineArgs, detect_device, resolve
from octavo.config.engine import EngineConfig
from octavo.formats import read_facts
from octavo.kernels import load

VOCAB = 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def tiny_model(kind: str, **shape: int) -> PreTrainedModel:
    """Kind "full": attention to everything; "mixed": one full layer and two that see 7 tokens, three KV groups."""
    torch.manual_seed(7)
    model: PreTrainedModel
    if kind == "full":
        model = LlamaForCausalLM(LlamaConfig(**(SHAPE | shape)))
    else:
        window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**(SHAPE | shape | window | {"attn_implementation": "eager"})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.4 * noise)
    model.double().train(False)
    return model


def write_tiny(kind: str, folder: Path, **shape: int) -> PreTrainedModel:
    """Writes config.json and weights; returns the transformers model. `shape` changes fields of SHAPE."""
    model = tiny_model(kind, **shape)
    save(model, folder)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")


def tiny_config(folder: Path, **changes: Any) -> EngineConfig:
    """An engine for the model in `folder`; float64 on the CPU unless `changes`, fields of EngineArgs, say otherwise."""
    given = {"dtype": "float64", "device": "cpu"} | changes
    args = EngineArgs(model=str(folder), **given)
    return resolve(args, read_facts(folder), detect_device(args.device))[0]


class Naive:
    """Generates by recomputing everything for every token, with transformers; remembers what it has computed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._logits = cache(self._compute)
        self._model = model

    def _compute(self, tokens: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return logits

    def generate(self, prompt: list[int], count: int, temperature: float, seed: int, eos: int | None) -> list[int]:
        tokens = list(prompt)
        kernels = load("cpu")
        while len(tokens) < len(prompt) + count:
            logits = self._logits(tuple(tokens))[None]
            neutral = torch.zeros(1)
            token = kernels.sample(
                logits,
                torch.tensor([temperature]),
                torch.zeros(1, dtype=torch.int64),
                neutral + 1,
                neutral,
                torch.tensor([seed]),
                torch.tensor([len(tokens)]),
            )
            tokens.append(int(token))
            if tokens[-1] == eos:
                break
        return tokens[len(prompt) :]
