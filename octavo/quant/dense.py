"""Weights as plain floats in the dtype of the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import Kernels
from octavo.quant.blocks import Blocks


class Dense:
    """Scheme: one tensor `weight` [out, in]; checkpoints of other float types are converted while copying."""

    granularity = {"weight": (1, 1)}  # noqa: RUF012
    keeps: frozenset[str] = frozenset()

    def create(self, out: int, in_: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"weight": torch.empty(out, in_, dtype=dtype, device=device)}

    def load(self, params: dict[str, Tensor], key: str, slot: tuple[slice, slice], tensor: Tensor | Blocks) -> None:
        assert isinstance(tensor, Tensor)
        params[key][slot].copy_(tensor)

    def finish(self, params: dict[str, Tensor]) -> None:
        """Nothing to repack."""

    def apply(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        return kernels.linear(x, params["weight"], bias)

    def apply_gated(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        return kernels.gated_linear(x, params["weight"], bias)

    def apply_onto(
        self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None, stream: Tensor
    ) -> bool:
        return kernels.add_linear(x, params["weight"], bias, stream)

    def apply_after_norm(
        self,
        kernels: Kernels,
        x: Tensor,
        residual: Tensor | None,
        norm: tuple[Tensor, float],
        params: dict[str, Tensor],
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        return kernels.norm_linear(x, residual, *norm, params["weight"], bias, gated)

    def gather(self, kernels: Kernels, index: Tensor, params: dict[str, Tensor]) -> Tensor:
        return kernels.embedding(index, params["weight"])
