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
from octavo.config.parallel import shard_of
from octavo.core.errors import UnsupportedModel
from octavo.core.facts import ModelFacts
from octavo.kernels import Kernels
from octavo.layers import Build
from octavo.parallel import Comm, Single
from octavo.quant import Dense, Scheme, Stored

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Module of this package -> its class."""


class Model(Protocol):
    """What the worker and the loader see of a model."""

    def __call__(self, batch: Batch, stream: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden] after the last norm, or of its `ends` alone; writes the KV of all tokens.

        A stage takes up the `stream` of the stage before and, unless it is the last, returns its own.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in the model's dtype."""

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name, as in Hugging Face checkpoints, and whole shape of every tensor that this rank needs a share of."""

    def load_weight(self, name: str, tensor: Stored) -> None:
        """Copies this rank's share of a tensor to its place; UnsupportedModel if no rank has one."""

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
    comm: Comm | None = None,
    layers: range | None = None,
) -> Model:
    """The model of `facts.architecture` with uninitialised weights; UnsupportedModel for an unknown family.

    `scheme` is the number format of its matrices, by default `dtype` itself. The ranks of `comm` share each layer;
    `layers` are those of this stage, by default all.
    """
    if facts.architecture not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise UnsupportedModel(f"architecture {facts.architecture!r} is not implemented; known are {known}")
    family = getattr(import_module(f"octavo.models.{facts.architecture}"), _FAMILIES[facts.architecture])
    comm, scheme = comm or Single(), scheme or Dense()
    specs = attn_specs(shard_of(facts, comm.size), block_size)
    build = Build(dtype, device, kernels, attention, specs, groups, comm, scheme, layers)
    return cast(Model, family(facts, build))
