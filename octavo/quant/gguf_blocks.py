"""GGUF's blocks taken apart: the integers of a row and the scales that give them value.

Owns the layout of a block (published with ggml: block_q4_0 ... block_q6_K in ggml-common.h). Formats ending in _0 are
symmetric (x = d * q), those in _1 have a minimum (x = d * q + m). The _K formats group 256 numbers under 16-bit
scales, which in turn multiply small integer scales of 16 or 32 numbers each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.formats.gguf import TYPES

Bytes = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]


class Parts(NamedTuple):
    """Numbers [n, size] = scales * (codes - zero) + minima; each of `groups` equal runs has a scale and a minimum."""

    codes: Bytes
    """uint8 [n, size]."""
    zero: int
    scales: Floats
    """[n, groups]."""
    minima: Floats | None = None
    """[n, groups]."""


def unpack(blocks: Bytes, type_name: str) -> Parts:
    """The parts of blocks [n, block bytes] uint8 of a format in `PACKED`."""
    return _UNPACK[type_name](blocks)


def floats(parts: Parts) -> Floats:
    """[n, size] float32."""
    n, groups = parts.scales.shape
    values = parts.codes.reshape(n, groups, -1).astype(np.float32)
    if parts.zero:
        values -= np.float32(parts.zero)
    values *= parts.scales[..., None]
    if parts.minima is not None:
        values += parts.minima[..., None]
    return values.reshape(n, -1)


def block_of(type_name: str) -> tuple[int, int]:
    """(numbers, bytes) of a block."""
    return next((size, nbytes) for name, size, nbytes in TYPES.values() if name == type_name)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


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


def _q4_0(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks, 2), 8, _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks, 4), 0, _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks, 6) | _fifth_bits(blocks, 2), 16, _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks, 8) | _fifth_bits(blocks, 4), 0, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Parts:
    return Parts(blocks[:, 2:] ^ 128, 128, _half(blocks, 0))


def _q2_k(blocks: Bytes) -> Parts:
    """scales[16] (scale and minimum in 4 bits each), qs[64] (2 bits), d, dmin; 16 numbers to a scale."""
    scales, minima = _half(blocks, 80) * (blocks[:, :16] & 15), _half(blocks, 82) * (blocks[:, :16] >> 4)
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return Parts(codes, 0, scales, -minima)


def _q3_k(blocks: Bytes) -> Parts:
    """hmask[32] (third bits; 0 subtracts 4), qs[64] (2 bits), scales[12] (6 bits each, minus 32), d."""
    low = _fields(blocks[:, 96:104], 4).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scales = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    codes = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    third = _fields(blocks[:, :32], 1).reshape(-1, 256)
    return Parts(codes | third << 2, 4, scales)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """12 bytes at 4 of _q4_k and _q5_k -> eight scales and eight minima of 6 bits, times d and -dmin: [n, 8] each.

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; the others' low 4 bits are the halves
    of bytes 8-11, their high 2 bits the top bits of bytes 0-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q4_k(blocks: Bytes) -> Parts:
    """d, dmin, scales[12], qs[128] (4 bits); 32 numbers to a scale."""
    codes = _fields(blocks[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 256)
    return Parts(codes, 0, *_scales_and_minima(blocks))


def _q5_k(blocks: Bytes) -> Parts:
    """d, dmin, scales[12], qh[32] (fifth bits), qs[128] (4 bits); 32 numbers to a scale."""
    low = _fields(blocks[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 256)
    codes = low | _fields(blocks[:, 16:48], 1).reshape(-1, 256) << 4
    return Parts(codes, 0, *_scales_and_minima(blocks))


def _q6_k(blocks: Bytes) -> Parts:
    """ql[128] (4 bits), qh[64] (2 bits), scales[16] int8, d; 16 numbers to a scale."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return Parts(low | high << 4, 32, _half(blocks, 208) * blocks[:, 192:208].view(np.int8))


_UNPACK: dict[str, Callable[[Bytes], Parts]] = {
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
PACKED = frozenset(_UNPACK)
"""The number formats that are known, plain floats aside."""
