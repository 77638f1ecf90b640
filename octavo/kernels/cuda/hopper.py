"""What the Gluon kernels for Hopper share: their decorator, the dtypes that they take, and what Triton has renamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Of the warps that run a function; Triton 3.6 has the first name, later ones the second."""


def device(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """A Gluon function, compiled once for all values of the arguments named in `varying`."""
    return lambda function: gluon.jit(function, do_not_specialize=list(varying))
