"""The calls of C kernels: the records that they take, and how they run or are recorded.

A kernel is called with one record, whose layout is that of the struct of the same name in the C sources. `run` calls it
with a team of threads; while the thread records (`recording`), the call is written down instead. Which target the
kernels are compiled for is chosen here.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.cpu import build

HALF = {torch.float32: False, torch.bfloat16: True}
"""Element types of the kernels; the value is their flag in C."""
SMALL = 65536
"""Multiplications and additions that one thread has done before the others have begun."""


def members(pointers: str, integers: str, real: str = "", flags: str = "") -> list[tuple[str, Any]]:
    """`_fields_` of a record with these members, in this order: addresses, int64, a float, int32."""
    kinds = ((pointers, ctypes.c_void_p), (integers, ctypes.c_int64), (real, ctypes.c_float), (flags, ctypes.c_int32))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Step(ctypes.Structure):
    _fields_ = members(
        "tables lines q_start seq_lens", "rows table_stride block_size heads kv_heads dim window half_kv"
    )


class Attention(ctypes.Structure):
    _fields_ = (("step", Step), *members("q k v out", "q_stride", "scale", "half_q"))


class Linear(ctypes.Structure):
    _fields_ = members("x residual total norm w bias y", "stride tokens in_features out", "eps", "half_x half_w gated")


class Norm(ctypes.Structure):
    _fields_ = members("x residual total weight y", "rows n", "eps", "half")


class Gate(ctypes.Structure):
    _fields_ = members("x y", "rows n half")


class Rope(ctypes.Structure):
    _fields_ = members(
        "qkv cos sin q_weight k_weight slots q k v",
        "tokens stride heads kv_heads dim width",
        "eps",
        "half half_kv",
    )


class Gather(ctypes.Structure):
    _fields_ = members("index table out", "count bytes")


class Rotation(ctypes.Structure):
    _fields_ = members("positions inv_freq cos sin", "count pairs stride", "scale")


class PrepareDecode(ctypes.Structure):
    _fields_ = members(
        "rows last_token num_computed tables tokens positions next seq_lens slots",
        "count padding groups group_stride row_stride slots_stride block_size",
    )


class Sampling(ctypes.Structure):
    _fields_ = members(
        "logits temperature top_p min_p top_k seed position lines last_token tokens", "rows vocab stride half"
    )


class Masking(ctypes.Structure):
    _fields_ = members("logits at bits", "rows vocab stride words")


class Call(ctypes.Structure):
    """`Call` of run.c."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Calls:
    """Calls written down, with the owner of the memory that they point to; `play` runs them on one team of threads."""

    def __init__(self, memory: object) -> None:
        self._memory = memory
        self._made: list[tuple[int, ctypes.Structure]] = []
        self._array = (Call * 0)()

    def __len__(self) -> int:
        return len(self._made)

    def add(self, kernel: int, record: ctypes.Structure) -> None:
        self._made.append((kernel, record))

    def finish(self) -> None:
        """No call follows."""
        self._array = (Call * len(self._made))(
            *(Call(kernel, ctypes.addressof(record)) for kernel, record in self._made)
        )

    def play(self) -> None:
        _run(self._array, len(self._array), False)


class _Thread(threading.local):
    recorded: Calls | None = None


class Functions:
    """The library's kernels by name, and what it can do."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.apply_masks = address(library, "apply_masks")
        self.attention = address(library, "attention")
        self.gather = address(library, "gather")
        self.linear = address(library, "linear")
        self.prepare_decode = address(library, "prepare_decode")
        self.rms_norm = address(library, "rms_norm")
        self.rope_norm_write_kv = address(library, "rope_norm_write_kv")
        self.rotation = address(library, "rotation")
        self.sample = address(library, "sample")
        self.silu_mul = address(library, "silu_mul")
        self.runs = library["run"]
        self.runs.restype, self.runs.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self.multiplies_bf16 = bool(library["multiplies_bf16"]())


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a kernel lies."""
    found = ctypes.cast(library[name], ctypes.c_void_p).value
    assert found is not None
    return found


_thread = _Thread()
_current: Functions | None = None


def functions() -> Functions:
    """Those compiled for this processor, or for the target in `use`. Raises build.BuildError."""
    global _current
    if _current is None:
        _current = Functions(build.library(build.FLOAT))
    return _current


def run(kernel: int, record: ctypes.Structure, work: int) -> None:
    """Calls a kernel, or writes the call down while this thread records. `work`: multiplications and additions.

    A written call is made later and again: `record` is kept with it, the memory that it points to is not.
    """
    if _thread.recorded is not None:
        _thread.recorded.add(kernel, record)
    else:
        _run(ctypes.byref(Call(kernel, ctypes.addressof(record))), 1, work <= SMALL)


def _run(calls: Any, count: int, alone: bool) -> None:
    if functions().runs(calls, count, alone):
        raise MemoryError("no memory for what CPU kernels compute with")


@contextlib.contextmanager
def recording(memory: object = None) -> Iterator[Calls]:
    """Within the context this thread's calls are written down and none is made; they keep `memory`."""
    assert _thread.recorded is None
    _thread.recorded = calls = Calls(memory)
    try:
        yield calls
        calls.finish()
    finally:
        _thread.recorded = None


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
