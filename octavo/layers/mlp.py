"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from octavo.core.facts import ModelFacts
from octavo.layers.build import Build
from octavo.layers.linear import Linear
from octavo.parallel import Column, Row


class MLP:
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202): [T, hidden] -> partial sums [T, hidden]."""

    def __init__(self, facts: ModelFacts, build: Build) -> None:
        hidden, size, bias = facts.hidden_size, facts.intermediate_size, facts.mlp_bias
        self.gate_up = Linear(hidden, Column({"gate": size, "up": size}), build, bias=bias)
        self.down = Linear(size, Row({"down": hidden}), build, bias=bias)
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._kernels.silu_mul(self.gate_up(x)))
