"""What every layer is built with, and what every layer with weights offers to the loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from octavo.attention import AttentionBackend, AttnSpec
from octavo.config.kv import KVGroup
from octavo.core.errors import UnsupportedModel
from octavo.kernels import Kernels
from octavo.parallel import Comm, Single
from octavo.quant import Blocks, Dense, Scheme

Load = Callable[[Tensor | Blocks], None]
"""Copies one checkpoint tensor into a layer; UnsupportedModel where its shape is not the layer's."""


@dataclass(frozen=True)
class Build:
    """The place and the parts that layers share. `specs` has one entry per layer of the model."""

    dtype: torch.dtype
    device: torch.device
    kernels: Kernels
    attention: AttentionBackend
    specs: tuple[AttnSpec, ...]
    groups: tuple[KVGroup, ...]
    comm: Comm = field(default_factory=Single)
    scheme: Scheme = field(default_factory=Dense)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def group_of(self, layer: int) -> int:
        return next(group.index for group in self.groups if layer in group.layers)


class Layer(Protocol):
    """A layer that owns weights."""

    def slots(self) -> Mapping[tuple[str, str], Load]:
        """Every checkpoint tensor that it needs, by (part, suffix): ("q", "weight"), ("", "bias"), ..."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Its parameters as they lie in memory."""

    def finish(self) -> None:
        """Once everything is loaded: puts the weights into the order that its kernel reads."""


class OneTensor:
    """A layer whose only parameter is `weight`, stored as the checkpoint has it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def slots(self) -> Mapping[tuple[str, str], Load]:
        return {("", "weight"): partial(copy_exact, self.weight)}

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def finish(self) -> None:
        """Nothing to repack."""


def copy_exact(into: Tensor, tensor: Tensor | Blocks) -> None:
    """Copies with dtype conversion; UnsupportedModel unless the shapes are equal."""
    check_shape(tensor, tuple(into.shape))
    assert isinstance(tensor, Tensor)
    into.copy_(tensor)


def check_shape(tensor: Tensor | Blocks, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise UnsupportedModel(
            f"weight of shape {list(tensor.shape)} where the model's configuration needs {list(expected)};"
            " check that config and weights belong together"
        )
