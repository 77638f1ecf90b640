"""What every kernel of this package launches with: the decorator, dtype and device checks, dependent launch.

With programmatic dependent launch (PDL) a kernel may begin while the one before it still runs, and waits
(`gdc_wait`) before it reads anything that an earlier kernel wrote. It needs compute capability 9.0 and is unknown to
Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as plain Python on the CPU."""
FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
"""What the kernels read and write; float64 is left to the reference."""
LOG2E = 1.4426950408889634

_allowed: bool | None = None


def kernel(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """A Triton function. Arguments named in `varying` take many values, so nothing is compiled anew for them."""

    def wrap(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(varying), do_not_specialize_on_alignment=list(varying))

    return wrap


def pdl() -> bool:
    """Whether kernels are launched with programmatic dependent launch."""
    global _allowed
    if _allowed is None:
        _allowed = not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return _allowed


@contextmanager
def without_pdl() -> Iterator[None]:
    """Launches, or captures, without it: for comparisons."""
    global _allowed
    before, _allowed = pdl(), False
    try:
        yield
    finally:
        _allowed = before


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take these: half types and float32, on a GPU or in the interpreter."""
    for tensor in tensors:  # noqa: SIM110  (all() takes twice the time, and layers ask at each call)
        if tensor.dtype not in FLOATS or not (tensor.is_cuda or INTERPRET):
            return False
    return True


def contiguous(*tensors: Tensor) -> bool:
    """Whether kernels can read these without strides."""
    for tensor in tensors:  # noqa: SIM110  (as above)
        if not tensor.is_contiguous():
            return False
    return True


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels written for compute capability 9.0 run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int) -> int:
    """The lowest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
