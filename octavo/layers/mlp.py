"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from octavo.core.facts import ModelFacts
from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.layers.norm import AddNorm
from octavo.parallel import Column, Row


class MLP:
    """down(silu(gate(h)) * up(h)) (SwiGLU, arXiv:2002.05202) of the normalised stream h: partial sums [T, hidden]."""

    def __init__(self, facts: ModelFacts, build: Build) -> None:
        hidden, size, bias = facts.hidden_size, facts.intermediate_size, facts.mlp_bias
        self.gate_up = Linear(hidden, Column({"gate": size, "up": size}), build, bias=bias)
        self.down = Linear(size, Row({"down": hidden}), build, bias=bias)

    def __call__(self, norm: AddNorm, partial: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(partial sums, stream) or (stream, None): the stream takes up `partial` and is normalised first."""
        x, stream = norm.into(self.gate_up, partial, stream, gated=True)
        return self.down.onto(x, stream)
