"""Bytes of a GGUF tensor become a tensor of floats, all of them or what a rank needs.

Works on a bounded number of blocks at a time, so that temporaries stay in the processor's cache; each such piece is one
task of a thread, since its steps are too short for a parallel region each. The layout of blocks is `quant.gguf_blocks`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.core.errors import UnsupportedModel
from octavo.quant import Blocks
from octavo.quant.blocks import whole_blocks
from octavo.quant.gguf_blocks import PACKED, block_of, floats, unpack

_CHUNK = 2**17
"""Numbers decoded at a time."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def check_type(type_name: str) -> None:
    """Raises UnsupportedModel for a number format that is not implemented."""
    if type_name not in _FLOATS and type_name not in PACKED:
        supported = ", ".join([*_FLOATS, *sorted(PACKED)])
        raise UnsupportedModel(f"GGUF number format {type_name} is not supported; supported: {supported}")


@dataclass(frozen=True)
class FileMatrix:
    """A matrix in a GGUF file: rows and columns are read, and made floats unless they are kept, when they are cut out.

    `order` are the file's rows in the order of the matrix, None where they are the same.
    """

    data: NDArray[np.uint8]
    """[rows, bytes of a row], a view of the file."""
    type: str
    kept: bool
    order: NDArray[np.int64] | None = None
    pool: Executor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        size, nbytes = block_of(self.type)
        return self.data.shape[0], self.data.shape[1] // nbytes * size

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor | Blocks:
        rows, cut = index
        columns = self.shape[1]
        if self.kept:
            data = self._rows(rows)[:, whole_blocks(self.type, columns, cut)]
            return Blocks(self.type, torch.from_numpy(np.array(data)))
        size, nbytes = block_of(self.type)
        start, stop, _ = cut.indices(columns)
        first, last = start // size, -(-stop // size)
        data = np.ascontiguousarray(self._rows(rows)[:, first * nbytes : last * nbytes])
        shape = (data.shape[0], (last - first) * size)
        return dequantize(data.data, self.type, shape, self.pool)[:, start - first * size : stop - first * size]

    def _rows(self, rows: slice) -> NDArray[np.uint8]:
        return self.data[rows if self.order is None else self.order[rows]]


def dequantize(
    data: bytes | memoryview, type_name: str, shape: tuple[int, ...], pool: Executor | None = None
) -> Tensor:
    """The tensor of row-major `shape` in `data`: float32, or the file's own float type for F16, BF16 and F64.

    The threads of `pool` share the work. Raises UnsupportedModel for a format that is not implemented.
    """
    check_type(type_name)
    if type_name in _FLOATS:
        return torch.frombuffer(bytearray(data), dtype=_FLOATS[type_name]).view(shape)
    size, nbytes = block_of(type_name)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, nbytes)
    out = np.empty((len(blocks), size), np.float32)
    step = _CHUNK // size

    def decode_from(start: int) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            out[start : start + step] = floats(unpack(blocks[start : start + step], type_name))

    starts = range(0, len(blocks), step)
    for _ in map(decode_from, starts) if pool is None else pool.map(decode_from, starts):
        pass
    return torch.from_numpy(out).view(shape)
