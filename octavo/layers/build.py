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
from octavo.quant import Blocks, Dense, Scheme, Stored


@dataclass(frozen=True)
class Slot:
    """The place of one checkpoint tensor; a call copies this rank's share of it there."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    load: Callable[[Stored], None]

    def __call__(self, tensor: Stored) -> None:
        """UnsupportedModel where the tensor has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise UnsupportedModel(
                f"weight of shape {list(tensor.shape)} where the model's configuration needs {list(self.shape)};"
                " check that config and weights belong together"
            )
        self.load(tensor)


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
    layers: range | None = None
    """Those of this stage; None: all."""

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def group_of(self, layer: int) -> int:
        return next(group.index for group in self.groups if layer in group.layers)


class Layer(Protocol):
    """A layer that owns weights."""

    def slots(self) -> Mapping[tuple[str, str], Slot]:
        """Every checkpoint tensor that it needs, by (part, suffix): ("q", "weight"), ("", "bias"), ..."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Its parameters as they lie in memory."""

    def finish(self) -> None:
        """Once everything is loaded: puts the weights into the order that its kernel reads."""


class OneTensor:
    """A layer whose only parameter is `weight`, stored as the checkpoint has it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def slots(self) -> Mapping[tuple[str, str], Slot]:
        return {("", "weight"): Slot(tuple(self.weight.shape), partial(copy_whole, self.weight))}

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def finish(self) -> None:
        """Nothing to repack."""


def copy_whole(into: Tensor, tensor: Stored) -> None:
    """Copies with dtype conversion."""
    into.copy_(floats(tensor[(slice(None),) * into.dim()]))


def floats(cut: Tensor | Blocks) -> Tensor:
    """A cut of what no scheme keeps in another format."""
    assert isinstance(cut, Tensor)
    return cut
