"""Families of models, one file each: their blocks, what they accept of a configuration, and their weight names.

Start with `llama`. Does not read files (`formats`, `weights`) and does not know number formats, devices or ranks, which
come in through `layers.Build`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from octavo.attention import AttentionBackend, Batch, attn_specs
from octavo.config.kv import KVGroup
from octavo.core.errors import UnsupportedModel
from octavo.core.facts import ModelFacts
from octavo.kernels import Kernels
from octavo.layers import Build
from octavo.quant import Blocks, Dense, Scheme

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Module of this package -> its class."""


class Model(Protocol):
    """What the worker and the loader see of a model."""

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] after the last norm; writes the KV of the batch's tokens."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in the model's dtype."""

    def load_weight(self, name: str, tensor: Tensor | Blocks) -> None:
        """Copies a tensor, named as in Hugging Face checkpoints, to its place; UnsupportedModel if it has none."""

    def finish_loading(self) -> None:
        """UnsupportedModel if a weight has not come; otherwise readies the weights for their kernels."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a name of its own."""


def build_model(
    facts: ModelFacts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    attention: AttentionBackend,
    groups: tuple[KVGroup, ...],
    block_size: int,
    scheme: Scheme | None = None,
) -> Model:
    """The model of `facts.architecture` with uninitialised weights; UnsupportedModel for an unknown family.

    `scheme` is the number format of its matrices, by default `dtype` itself.
    """
    if facts.architecture not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise UnsupportedModel(f"architecture {facts.architecture!r} is not implemented; known are {known}")
    family = getattr(import_module(f"octavo.models.{facts.architecture}"), _FAMILIES[facts.architecture])
    specs = attn_specs(facts, block_size)
    return cast(Model, family(facts, Build(dtype, device, kernels, attention, specs, groups, scheme=scheme or Dense())))
