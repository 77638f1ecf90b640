"""Matrices of 4, 6 or 8-bit codes with scales per group: how they are packed for the kernel, and products with them.

Owns the packed format together with quant_layout.h, which describes it. Does not know file formats.
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


Bytes = NDArray[np.uint8]


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
        "x weight bias out norm residual stream multiply", "type rows columns format outs stride", "eps", "gated"
    )


class Gather(ctypes.Structure):
    """`struct gather` of quant_linear.c."""

    _fields_ = native.members("weight index out", "format columns count type")


class Kernels:
    """Those for a target, which the flags name. Raises build.BuildError where not all formats' share compiles."""

    def __init__(self, flags: tuple[str, ...] = build.NATIVE) -> None:
        self._flags = flags
        self._products: dict[Format, int] = {}
        library = build.library(build.QUANT, flags)
        self.linear = native.address(library, "octavo_quant_linear")
        self.rows = native.address(library, "octavo_quant_rows")
        self.wide = bool(library.octavo_quant_wide())

    def product(self, format: Format) -> int:
        """The format's own. Raises build.BuildError where that does not compile."""
        if format not in self._products:
            library = build.library(build.FORMATS, build.for_format(format.number, self._flags))
            library.octavo_quant_product.restype = ctypes.c_void_p
            self._products[format] = library.octavo_quant_product(format.number)
        return self._products[format]


def pack(format: Format, codes: Tensor, scales: Tensor, minima: Tensor | None) -> Packed:
    """codes [out, in] uint8, scales and minima [out, in / group] of float32 or float16, rounded to the latter.

    Works in numpy, so that several threads may pack at once.
    """
    outs, columns = codes.shape
    assert columns % COLUMNS == 0
    blocks = codes.numpy().reshape(outs, -1, COLUMNS)
    four = np.uint8(4)
    if format.bits == 4:
        return pack_nibbles(format, blocks[..., :16] | blocks[..., 16:] << four, scales.numpy(), _numpy(minima))
    low = blocks if format.bits == 8 else blocks[..., :16] & np.uint8(15) | blocks[..., 16:] << four
    data = _panels(format, low, scales.numpy(), _numpy(minima))
    if format.bits == 6:
        words = _whole_panels(blocks).reshape(*data.shape[:1], PANEL, -1, 2, 4, 4) >> 4
        words = words.transpose(4, 0, 2, 3, 1, 5)  # quad, panel, block, half, row, column
        data["high"] = (words[0] | words[1] << 2 | words[2] << 4 | words[3] << 6).reshape(data["high"].shape)
    return _packed(format, outs, columns, data)


def pack_nibbles(format: Format, nibbles: Bytes, scales: NDArray[Any], minima: NDArray[Any] | None) -> Packed:
    """`pack` for codes in pairs: nibbles [out, blocks, 16], the high ones those of columns 16.. of a block."""
    outs, blocks, _ = nibbles.shape
    return _packed(format, outs, blocks * COLUMNS, _panels(format, nibbles, scales, minima))


def _panels(format: Format, low: Bytes, scales: NDArray[Any], minima: NDArray[Any] | None) -> NDArray[np.void]:
    """Panels' blocks [panels, blocks] as the kernel's comment lays them out; those of 6 bits lack the high bits yet."""
    assert (minima is not None) == format.has_min
    words = _whole_panels(np.ascontiguousarray(low)).view(np.int32)  # panels * PANEL, blocks, quads
    words = words.reshape(-1, PANEL, *words.shape[1:])
    groups = COLUMNS // format.group
    fields: list[Any] = [("low", np.int32, (words.shape[3], PANEL))]
    fields += [("high", np.uint8, (2, 4 * PANEL))] if format.bits == 6 else []
    fields += [("scales", np.float16, (groups, PANEL))]
    fields += [("minima", np.float16, (PANEL,))] if format.has_min else []
    data = np.empty((words.shape[0], words.shape[2]), fields)
    data["low"] = words.transpose(0, 2, 3, 1)
    with np.errstate(over="ignore"):
        data["scales"] = _whole_panels(scales).reshape(-1, PANEL, words.shape[2], groups).transpose(0, 2, 3, 1)
        if minima is not None:
            data["minima"] = _whole_panels(minima).reshape(-1, PANEL, words.shape[2]).transpose(0, 2, 1)
    return data


def _packed(format: Format, outs: int, columns: int, data: NDArray[np.void]) -> Packed:
    return Packed(format, outs, columns, torch.from_numpy(data.view(np.uint8).reshape(*data.shape, -1)))


def _numpy(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else tensor.numpy()


def _whole_panels(rows: NDArray[Any]) -> NDArray[Any]:
    missing = -rows.shape[0] % PANEL
    return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1))) if missing else rows


def stack(matrices: Sequence[Packed]) -> Packed:
    """The rows of matrices of one format one after another; all but the last have whole panels."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
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
    kernels = _kernels()
    product = Product(
        x.data_ptr(),
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if stream is None else stream.data_ptr(),
        kernels.product(weight.format),
        DTYPES.index(x.dtype),
        rows,
        columns,
        weight.format.number,
        weight.outs,
        stride,
        0.0 if norm is None else norm[1],
        gated,
    )
    native.run(kernels.linear, product, rows * columns * weight.outs)


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
    """None if the kernels can run here, otherwise the reason why not, which is also logged once.

    A format's own may be missing nevertheless: see `multiplies`.
    """
    try:
        _kernels()
    except build.BuildError as error:
        logger.warning("kernels for quantized weights are off, weights are expanded to floats: %s", error)
        return str(error)
    return None


@functools.cache
def multiplies(format: Format) -> bool:
    """Whether `linear` takes the format here; waits for its kernels. If not, the log says why, once."""
    try:
        _kernels().product(format)
    except build.BuildError as error:
        logger.warning("no kernels for %s weights, they are expanded to floats: %s", format.name, error)
        return False
    return True


_kernels = functools.cache(Kernels)


def compile_soon(format: Format) -> None:
    """Starts compiling the format's kernels."""
    build.compile_soon((build.FORMATS, build.for_format(format.number)))
