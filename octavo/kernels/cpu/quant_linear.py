"""Matrices of 4, 6 or 8-bit codes with scales per group: how they are packed for the kernel, and products with them.

Owns the packed format together with quant_linear.c, which describes it. Does not know file formats.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.cpu import build, native

logger = logging.getLogger("octavo")

SOURCES = ("quant_linear.c",)
COLUMNS = 32
"""Columns of a block: activations are quantized by as many, and a matrix has a multiple of them."""
PANEL = 16
"""Rows that lie interleaved."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of activations, in the order of the kernel's type numbers."""


class Format(Enum):
    """A weight is scale * (code - zero), or scale * code + minimum.

    (number in the kernel, bits of a code, columns of a scale, zero, whether there are minima)
    """

    Q4 = (0, 4, 32, 8, False)
    Q4_MIN = (1, 4, 32, 0, True)
    Q6 = (2, 6, 32, 16, False)
    Q6_MIN = (3, 6, 32, 0, True)
    Q6_16 = (4, 6, 16, 32, False)
    Q8 = (5, 8, 32, 128, False)

    def __init__(self, number: int, bits: int, group: int, zero: int, has_min: bool) -> None:
        self.number, self.bits, self.group, self.zero, self.has_min = number, bits, group, zero, has_min


@dataclass(frozen=True)
class Packed:
    """A matrix [outs, columns] as the kernel reads it: data [panels, blocks, block bytes] uint8."""

    format: Format
    outs: int
    columns: int
    data: Tensor


class Product(ctypes.Structure):
    """`struct product` of quant_linear.c."""

    _fields_ = native.members(
        "x weight bias out norm residual stream", "type rows columns format outs stride", "eps", "gated"
    )


class Gather(ctypes.Structure):
    """`struct gather` of quant_linear.c."""

    _fields_ = native.members("weight index out", "format columns count type")


class Kernels:
    """Those of a library made of SOURCES."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.linear = native.address(library, "octavo_quant_linear")
        self.rows = native.address(library, "octavo_quant_rows")
        self.wide = bool(library.octavo_quant_wide())


def pack(format: Format, codes: Tensor, scales: Tensor, minima: Tensor | None) -> Packed:
    """codes [out, in] uint8, scales and minima [out, in / group] of float32 or float16, rounded to the latter.

    Works in numpy, so that several threads may pack at once.
    """
    outs, columns = codes.shape
    assert columns % COLUMNS == 0
    assert (minima is not None) == format.has_min
    whole = _whole_panels(codes)
    panels, blocks = len(whole) // PANEL, columns // COLUMNS
    words = whole.view(np.int32).reshape(panels, PANEL, blocks, 2, 4)
    quads = np.ascontiguousarray(words.transpose(0, 2, 3, 4, 1)).view(np.uint8)  # panel, block, half, quad, 64
    parts: list[NDArray[Any]] = [quads] if format.bits == 8 else [quads[:, :, 0] & 15 | quads[:, :, 1] << 4]
    if format.bits == 6:
        high = quads >> 4
        parts.append(high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6)
    for values in [scales] if minima is None else [scales, minima]:
        with np.errstate(over="ignore"):
            halves = _whole_panels(values).astype(np.float16).reshape(panels, PANEL, blocks, -1)
        parts.append(np.ascontiguousarray(halves.transpose(0, 2, 3, 1)).view(np.uint8))
    data = np.concatenate([part.reshape(panels, blocks, -1) for part in parts], 2)
    return Packed(format, outs, columns, torch.from_numpy(data))


def _whole_panels(rows: Tensor) -> NDArray[Any]:
    return np.pad(rows.numpy(), ((0, -rows.shape[0] % PANEL), (0, 0)))


def stack(matrices: Sequence[Packed]) -> Packed:
    """The rows of matrices of one format one after another; all but the last have whole panels."""
    first = matrices[0]
    assert all(m.format is first.format and m.columns == first.columns for m in matrices)
    assert not any(m.outs % PANEL for m in matrices[:-1])
    return Packed(first.format, sum(m.outs for m in matrices), first.columns, torch.cat([m.data for m in matrices]))


def linear(x: Tensor, weight: Packed, bias: Tensor | None, out: Tensor) -> None:
    """out [T, outs] = x [T, columns] @ weight.T + bias, x rounded per 32 columns on the way in: see quant_linear.c.

    x, bias and out are of one type out of DTYPES; out's rows may lie apart.
    """
    _linear(x, weight, bias, out, out.stride(0))


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: tuple[Tensor, float], weight: Packed, bias: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """(linear(rms_norm(s)), s) of s = x + residual (or x), norm = (weight, eps), all of one type out of DTYPES.

    gated: silu of the first half of the outputs times the second, and each half is a multiple of PANEL.
    """
    outs = weight.outs // 2 if gated else weight.outs
    assert not (gated and outs % PANEL)
    out = torch.empty(x.shape[0], outs, dtype=x.dtype)
    x = x.contiguous()
    stream = x if residual is None else torch.empty_like(x)
    residual = None if residual is None else residual.contiguous()
    _linear(x, weight, bias, out, outs, norm, residual, stream, gated)
    return out, stream


def _linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out: Tensor,
    stride: int,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    stream: Tensor | None = None,
    gated: bool = False,
) -> None:
    rows, columns = x.shape
    assert columns == weight.columns
    x = x.contiguous()
    product = Product(
        x.data_ptr(),
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if stream is None else stream.data_ptr(),
        DTYPES.index(x.dtype),
        rows,
        columns,
        weight.format.number,
        weight.outs,
        stride,
        0.0 if norm is None else norm[1],
        gated,
    )
    native.run(_kernels().linear, product, rows * columns * weight.outs)


def rows(weight: Packed, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows index [N] int64 as floats of `dtype`, one out of DTYPES: [N, columns]."""
    out = torch.empty(index.shape[0], weight.columns, dtype=dtype)
    index = index.contiguous()
    gather = Gather(
        weight.data.data_ptr(),
        index.data_ptr(),
        out.data_ptr(),
        weight.format.number,
        weight.columns,
        index.shape[0],
        DTYPES.index(dtype),
    )
    native.run(_kernels().rows, gather, 8 * out.numel())
    return out


def fine(format: Format) -> bool:
    """Whether products with codes of this format take all activations as 15-bit integers, for lack of faster ones."""
    return format.bits == 8 and _kernels().wide


@functools.cache
def available() -> str | None:
    """None if the kernels can run here, otherwise the reason why not, which is also logged once."""
    try:
        _kernels()
    except build.BuildError as error:
        logger.warning("kernels for quantized weights are off, weights are expanded to floats: %s", error)
        return str(error)
    return None


@functools.cache
def _kernels() -> Kernels:
    return Kernels(build.library(SOURCES))
