"""What a number format must offer to a Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import Kernels
from octavo.quant.blocks import Blocks


class Scheme(Protocol):
    """The format of an [out, in] matrix."""

    @property
    def granularity(self) -> Mapping[str, tuple[int, int]]:
        """Checkpoint tensors of one matrix by suffix ("weight", ...): elements (out, in) that one entry covers."""

    @property
    def keeps(self) -> frozenset[str]:
        """Number formats of GGUF that `load` takes as Blocks; others come to it as floats."""

    def create(self, out: int, in_: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Uninitialised parameters. `dtype` is the activations'."""

    def load(self, params: dict[str, Tensor], key: str, slot: tuple[slice, slice], tensor: Tensor | Blocks) -> None:
        """Stores a checkpoint tensor, already cut to what this rank holds, at `slot` of the parameter `key`."""

    def finish(self, params: dict[str, Tensor]) -> None:
        """Once everything is loaded: repacks for the kernel, where it wants another order."""

    def apply(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out]."""

    def apply_gated(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        """silu_mul(apply(x)) [T, out / 2]."""

    def apply_onto(
        self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None, stream: Tensor
    ) -> bool:
        """stream [T, out] += apply(x), in place, where that saves time; False, with nothing done, elsewhere."""

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
        """(apply(rms_norm(s)), s) of s = x + residual (or x) [T, in], norm = (weight, eps); gated: apply_gated."""

    def gather(self, kernels: Kernels, index: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Rows index [T] int64 of the matrix: [T, in]."""
