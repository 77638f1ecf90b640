"""Tapes: the kernels' calls of a piece of work, recorded once and then replayed by a single C call.

While a `Tapes` records, Python runs as ever but nothing is computed: kernels' calls are written down (`native.run`),
tensors are views or empty memory of the tapes' own pool, and any other operation of torch is an error, so a tape cannot
miss work. What varies between replays lies in memory that the caller owns and keeps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.cpu import native

EMPTY = frozenset({torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty})


class Unrecordable(RuntimeError):
    """The work does something between its kernels that no tape can replay."""


class Tapes:
    """Recorded pieces of work that share memory, so that a replay overwrites the results of all others."""

    def __init__(self) -> None:
        self._pool = _Pool()

    @property
    def nbytes(self) -> int:
        """Memory that the tapes share, without what kernels need for themselves."""
        return self._pool.nbytes

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `work` without computing it: what replays it, and the tensor that it returns.

        `work` returns new and contiguous memory. Raises Unrecordable; the replay may raise MemoryError.
        """
        with native.recording(self._pool) as calls, _Watch(self._pool):
            result = work()
        return calls.play, self._pool.view(result)


class _Pool:
    """Memory for tensors that live within a recording, by powers of two; what a dead tensor had is given out again."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        shape = tuple(shape)
        size = 1 << max(math.prod(shape) * dtype.itemsize - 1, 63).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            free.append(torch.empty(size + 64, dtype=torch.uint8))
            self._blocks.append(free[-1])
        block = free.pop()
        start = -block.data_ptr() % 64
        memory = block.numpy()[start : start + size]
        weakref.finalize(memory, free.append, block)
        whole = torch.from_numpy(memory)[: math.prod(shape) * dtype.itemsize]
        return whole.view(dtype).view(shape)

    def view(self, tensor: Tensor) -> Tensor:
        """The same memory of this pool, but free for other tensors."""
        address, size = tensor.data_ptr(), tensor.nbytes
        block = next(b for b in self._blocks if b.data_ptr() <= address < b.data_ptr() + b.nbytes)
        start = address - block.data_ptr()
        return block[start : start + size].view(tensor.dtype).view(tensor.shape)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of torch on this thread."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled by torch, whose compiler would be imported to say so: 1.7 s at the first token."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in EMPTY:
            meta = func(*args, **kwargs | {"device": "meta"})
            if meta.is_contiguous():
                return self._pool.empty(meta.shape, meta.dtype)
        elif func.is_view:
            result = func(*args, **kwargs)
            place = args[0].untyped_storage().data_ptr()
            made = result if isinstance(result, tuple | list) else (result,)
            if all(tensor.untyped_storage().data_ptr() == place for tensor in made):
                return result
        raise Unrecordable(f"{func} computes, and is no kernel")
