"""The C functions of the kernels for float weights, typed; which target they are compiled for is chosen here."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.cpu import build

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float

HALF = {torch.float32: False, torch.bfloat16: True}
"""Element types of the kernels; the value is their flag in C."""


class Step(ctypes.Structure):
    """`Step` of attention.c."""

    _fields_ = (
        ("tables", _ADDRESS),
        ("lines", _ADDRESS),
        ("q_start", _ADDRESS),
        ("seq_lens", _ADDRESS),
        ("rows", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("half_q", ctypes.c_int32),
        ("half_kv", ctypes.c_int32),
    )


class Sampling(ctypes.Structure):
    """`Sampling` of sampling.c."""

    _fields_ = (
        ("logits", _ADDRESS),
        ("temperature", _ADDRESS),
        ("top_p", _ADDRESS),
        ("min_p", _ADDRESS),
        ("top_k", _ADDRESS),
        ("seed", _ADDRESS),
        ("position", _ADDRESS),
        ("lines", _ADDRESS),
        ("last_token", _ADDRESS),
        ("tokens", _ADDRESS),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


class Functions:
    """The library's functions; arguments are explained in the C sources."""

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            found = library[name]
            found.restype, found.argtypes = result, arguments
            return found

        a, n, i = _ADDRESS, _LONG, _INT
        self.linear = function("linear", i, a, n, i, a, a, a, _FLOAT, a, i, a, i, a, n, n, n)
        self.rms_norm = function("rms_norm", None, a, a, a, a, a, n, n, _FLOAT, i)
        self.silu_mul = function("silu_mul", None, a, a, n, n, i)
        self.rope_norm_write_kv = function("rope_norm_write_kv", None, *[a] * 9, *[n] * 6, _FLOAT, i, i)
        self.attention = function("attention", _INT, a, a, ctypes.c_int64, a, a, _FLOAT, a)
        self.sample = function("sample", _INT, a)
        self.multiplies_bf16 = bool(function("multiplies_bf16", _INT)())


_current: Functions | None = None


def functions() -> Functions:
    """Those compiled for this processor, or for the target in `use`. Raises build.BuildError."""
    global _current
    if _current is None:
        _current = Functions(build.library(build.FLOAT))
    return _current


@contextlib.contextmanager
def use(flags: Sequence[str]) -> Iterator[None]:
    """Within the context kernels are those compiled with `flags` instead of for this processor."""
    global _current
    before, _current = _current, Functions(build.library(build.FLOAT, flags))
    try:
        yield
    finally:
        _current = before


def dense(x: Tensor) -> bool:
    """Whether x lies in CPU memory, contiguous, in an element type of the kernels."""
    return x.dtype in HALF and x.is_cpu and x.is_contiguous()
