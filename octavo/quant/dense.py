"""Weights as plain floats in the dtype of the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import Kernels


class Dense:
    """Scheme: one tensor `weight` [out, in]; checkpoints of other float types are converted while copying."""

    granularity = {"weight": (1, 1)}  # noqa: RUF012

    def create(self, out: int, in_: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"weight": torch.empty(out, in_, dtype=dtype, device=device)}

    def load(self, params: dict[str, Tensor], key: str, slot: tuple[slice, slice], tensor: Tensor) -> None:
        params[key][slot].copy_(tensor)

    def finish(self, params: dict[str, Tensor]) -> None:
        """Nothing to repack."""

    def apply(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        return kernels.linear(x, params["weight"], bias)
