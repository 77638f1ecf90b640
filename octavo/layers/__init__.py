"""The blocks that models are made of: plain classes with a typed `__call__` over packed tokens [T, ...].

Start with `build` (what every layer is built with), then `linear`. Layers own their weights and nothing else: the step
comes in as `batch`, computation is `kernels`, attention is a backend. Does not know families of models or checkpoint
files.
"""

from __future__ import annotations

from octavo.layers.attention import Attention
from octavo.layers.build import Build, Layer, Slot
from octavo.layers.embedding import Embedding, Head
from octavo.layers.linear import Linear
from octavo.layers.mlp import MLP
from octavo.layers.norm import AddNorm, Join, RMSNorm
from octavo.layers.rope import Rope

__all__ = [
    "MLP",
    "AddNorm",
    "Attention",
    "Build",
    "Embedding",
    "Head",
    "Join",
    "Layer",
    "Linear",
    "RMSNorm",
    "Rope",
    "Slot",
]
