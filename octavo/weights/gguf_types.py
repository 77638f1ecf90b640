"""GGUF's number formats become floats: each block of a row holds packed integers and the scales that give them value.

Owns the layout of a block (published with ggml: block_q4_0 ... block_q6_K in ggml-common.h). Works on a
bounded number of blocks at a time, so that temporaries stay in the processor's cache; each such piece is one task of a
thread, since its steps are too short for a parallel region each.

Formats ending in _0 are symmetric (x = d * q), those in _1 have a minimum (x = d * q + m). The _K formats
group 256 numbers under 16-bit scales, which in turn multiply small integer scales of 16 or 32 numbers each.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.core.errors import UnsupportedModel
from octavo.formats.gguf import TYPES

_CHUNK = 2**17
"""Numbers decoded at a time."""

Bytes = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]
Decode = Callable[[Bytes], Floats]
"""Bytes [n, block bytes], uint8 -> [n, ...], block size numbers for each of n."""


def dequantize(
    data: bytes | memoryview, type_name: str, shape: tuple[int, ...], pool: Executor | None = None
) -> Tensor:
    """The tensor of row-major `shape` in `data`: float32, or the file's own float type for F16, BF16 and F64.

    The threads of `pool` share the work. Raises UnsupportedModel for a format that is not implemented.
    """
    if type_name in _FLOATS:
        return torch.frombuffer(bytearray(data), dtype=_FLOATS[type_name]).view(shape)
    if type_name not in _DECODERS:
        supported = ", ".join([*_FLOATS, *_DECODERS])
        raise UnsupportedModel(f"GGUF number format {type_name} is not supported; supported: {supported}")
    decode = _DECODERS[type_name]
    _, size, nbytes = next(entry for entry in TYPES.values() if entry[0] == type_name)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, nbytes)
    out = np.empty((len(blocks), size), np.float32)
    step = _CHUNK // size

    def decode_from(start: int) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            part = decode(blocks[start : start + step])
            out[start : start + step] = part.reshape(-1, size)

    starts = range(0, len(blocks), step)
    for _ in map(decode_from, starts) if pool is None else pool.map(decode_from, starts):
        pass
    return torch.from_numpy(out).view(shape)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _signed(packed: Bytes) -> Floats:
    return packed.view(np.int8).astype(np.float32)


def _float(packed: Bytes) -> Floats:
    return packed.astype(np.float32)


def _fields(packed: Bytes, bits: int) -> Bytes:
    """[..., b] bytes -> [..., 8 // bits, b]: their fields of `bits` bits, lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)


def _nibbles(blocks: Bytes, at: int) -> Bytes:
    """16 bytes -> 32 numbers 0..15: the low halves of all bytes, then the high ones. [n, 32]."""
    return _fields(blocks[:, at : at + 16], 4).reshape(-1, 32)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """4 bytes -> 32 numbers 0 or 16, the first in the lowest bit. [n, 32]."""
    return _fields(blocks[:, at : at + 4, None], 1).reshape(-1, 32) << 4


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_float(_nibbles(blocks, 2)) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _float(_nibbles(blocks, 4)) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_float(_nibbles(blocks, 6) | _fifth_bits(blocks, 2)) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _float(_nibbles(blocks, 8) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _signed(blocks[:, 2:])


def _q2_k(blocks: Bytes) -> Floats:
    """scales[16] (scale and minimum in 4 bits each), qs[64] (2 bits), d, dmin; 16 numbers to a scale."""
    scale = _half(blocks, 80) * _float(blocks[:, :16] & 15)
    minimum = _half(blocks, 82) * _float(blocks[:, :16] >> 4)
    q = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale[..., None] * _float(q) - minimum[..., None]


def _q3_k(blocks: Bytes) -> Floats:
    """hmask[32] (third bits; 0 subtracts 4), qs[64] (2 bits), scales[12] (6 bits each, minus 32), d."""
    low = _fields(blocks[:, 96:104], 4).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scale = _half(blocks, 108) * (_float(low | high << 4) - 32)
    q = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    third = _fields(blocks[:, :32], 1).reshape(-1, 16, 16)
    return scale[..., None] * (_float(q | third << 2) - 4)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """12 bytes at 4 of _q4_k and _q5_k -> eight scales and eight minima of 6 bits, times d and dmin: [n, 8, 1] each.

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; the others' low 4 bits are the halves
    of bytes 8-11, their high 2 bits the top bits of bytes 0-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return (_half(blocks, 0) * _float(scales))[..., None], (_half(blocks, 2) * _float(minima))[..., None]


def _q4_k(blocks: Bytes) -> Floats:
    """d, dmin, scales[12], qs[128] (4 bits); 32 numbers to a scale."""
    scale, minimum = _scales_and_minima(blocks)
    q = _fields(blocks[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return scale * _float(q) - minimum


def _q5_k(blocks: Bytes) -> Floats:
    """d, dmin, scales[12], qh[32] (fifth bits), qs[128] (4 bits); 32 numbers to a scale."""
    scale, minimum = _scales_and_minima(blocks)
    low = _fields(blocks[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return scale * _float(low | _fields(blocks[:, 16:48], 1) << 4) - minimum


def _q6_k(blocks: Bytes) -> Floats:
    """ql[128] (4 bits), qh[64] (2 bits), scales[16] int8, d; 16 numbers to a scale."""
    scale = _half(blocks, 208) * _signed(blocks[:, 192:208])
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale[..., None] * (_float(low | high << 4) - 32)


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_DECODERS: dict[str, Decode] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
