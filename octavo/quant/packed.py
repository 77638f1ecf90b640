"""Weights that stay quantized in a CPU's memory and are multiplied as integers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from octavo.kernels import Kernels
from octavo.kernels.cpu import quant_linear
from octavo.kernels.cpu.quant_linear import PANEL, Packed
from octavo.quant.blocks import Blocks


class Parts(dict[str, Tensor]):
    """Parameters of an [out, in] matrix whose parts, runs of rows, may be of different formats."""

    def __init__(self, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out, self.dtype = out, dtype
        self.at: list[tuple[int, Packed | Tensor]] = []
        """(first row, the part), in the order of rows once finished."""
        self.whole: Packed | None = None
        """The only part, where it is packed."""


class PackedScheme(ABC):
    """Scheme: parts are packed as they come; adjacent ones of one format become one matrix when all are there.

    A part that no kernel takes is held as floats. Activations are float32 or bfloat16 and are rounded to 8 bits in
    blocks of 32 columns, whatever the part's format.
    """

    granularity = {"weight": (1, 1)}  # noqa: RUF012
    keeps: frozenset[str] = frozenset()

    @abstractmethod
    def pack(self, tensor: Tensor | Blocks, dtype: torch.dtype) -> Packed | Tensor:
        """A part as it is held; floats in `dtype` where no kernel takes it."""

    def create(self, out: int, in_: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        assert device.type == "cpu"
        assert dtype in quant_linear.DTYPES
        return Parts(out, dtype)

    def load(self, params: dict[str, Tensor], key: str, slot: tuple[slice, slice], tensor: Tensor | Blocks) -> None:
        assert isinstance(params, Parts)
        params.at.append((slot[0].start, self.pack(tensor, params.dtype)))

    def finish(self, params: dict[str, Tensor]) -> None:
        assert isinstance(params, Parts)
        merged: list[tuple[int, Packed | Tensor]] = []
        for row, packed in sorted(params.at, key=lambda entry: entry[0]):
            part = _multiplied(packed, params.dtype)
            if merged and (both := _join(merged[-1][1], part)) is not None:
                merged[-1] = merged[-1][0], both
            else:
                merged.append((row, part))
        params.at = merged
        if len(merged) == 1 and isinstance(merged[0][1], Packed):
            params.whole = merged[0][1]
        for i, (_, part) in enumerate(merged):
            name = "weight" if len(merged) == 1 else f"weight.{i}"
            params[name] = part.data if isinstance(part, Packed) else part

    def apply(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        assert isinstance(params, Parts)
        out = torch.empty(x.shape[0], params.out, dtype=x.dtype)
        if params.whole is not None:
            quant_linear.linear(x, params.whole, bias, out)
            return out
        for row, part in params.at:
            end = row + _rows(part)
            some = None if bias is None else bias[row:end]
            if isinstance(part, Packed):
                quant_linear.linear(x, part, some, out[:, row:end])
            else:
                out[:, row:end] = kernels.linear(x, part, some)
        return out

    def apply_gated(self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        return kernels.silu_mul(self.apply(kernels, x, params, bias))

    def apply_onto(
        self, kernels: Kernels, x: Tensor, params: dict[str, Tensor], bias: Tensor | None, stream: Tensor
    ) -> bool:
        return False

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
        assert isinstance(params, Parts)
        if params.whole is not None and not (gated and params.out % (2 * PANEL)):
            return quant_linear.norm_linear(x, residual, norm, params.whole, bias, gated)
        if residual is None:
            normalised, stream = kernels.rms_norm(x, *norm), x
        else:
            normalised, stream = kernels.add_rms_norm(x, residual, *norm)
        apply = self.apply_gated if gated else self.apply
        return apply(kernels, normalised, params, bias), stream

    def gather(self, kernels: Kernels, index: Tensor, params: dict[str, Tensor]) -> Tensor:
        assert isinstance(params, Parts)
        if params.whole is not None:
            return quant_linear.rows(params.whole, index, params.dtype)
        ((_, part),) = params.at
        assert isinstance(part, Tensor)
        return kernels.embedding(index, part)


def _rows(part: Packed | Tensor) -> int:
    return part.outs if isinstance(part, Packed) else part.shape[0]


def _multiplied(part: Packed | Tensor, dtype: torch.dtype) -> Packed | Tensor:
    """The part, as floats in `dtype` if kernels for its format do not compile."""
    if isinstance(part, Tensor) or quant_linear.multiplies(part.format):
        return part
    return quant_linear.rows(part, torch.arange(part.outs), dtype)


def _join(upper: Packed | Tensor, lower: Packed | Tensor) -> Packed | Tensor | None:
    """The two as one, None if they cannot be."""
    if isinstance(upper, Packed) and isinstance(lower, Packed):
        same = upper.format is lower.format and upper.outs % PANEL == 0
        return quant_linear.stack([upper, lower]) if same else None
    if isinstance(upper, Tensor) and isinstance(lower, Tensor):
        return torch.cat([upper, lower])
    return None
