"""Bytes of a GGUF tensor become a tensor of floats.

Works on a bounded number of blocks at a time, so that temporaries stay in the processor's cache; each such piece is one
task of a thread, since its steps are too short for a parallel region each. The layout of blocks is `quant.gguf_blocks`.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from octavo.core.errors import UnsupportedModel
from octavo.quant.gguf_blocks import PACKED, block_of, floats, unpack

_CHUNK = 2**17
"""Numbers decoded at a time."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def dequantize(
    data: bytes | memoryview, type_name: str, shape: tuple[int, ...], pool: Executor | None = None
) -> Tensor:
    """The tensor of row-major `shape` in `data`: float32, or the file's own float type for F16, BF16 and F64.

    The threads of `pool` share the work. Raises UnsupportedModel for a format that is not implemented.
    """
    if type_name in _FLOATS:
        return torch.frombuffer(bytearray(data), dtype=_FLOATS[type_name]).view(shape)
    if type_name not in PACKED:
        supported = ", ".join([*_FLOATS, *sorted(PACKED)])
        raise UnsupportedModel(f"GGUF number format {type_name} is not supported; supported: {supported}")
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
