"""GGUF weights as they are: each block's integers and scales go to the kernel's order, none of them becomes a float."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.cpu import quant_linear
from octavo.kernels.cpu.quant_linear import Format, Packed
from octavo.quant.blocks import Blocks
from octavo.quant.gguf_blocks import block_of, unpack
from octavo.quant.packed import PackedScheme

FORMATS = {
    "Q4_0": Format.Q4,
    "Q4_1": Format.Q4_MIN,
    "Q5_0": Format.Q6,
    "Q5_1": Format.Q6_MIN,
    "Q8_0": Format.Q8,
    "Q4_K": Format.Q4_MIN,
    "Q5_K": Format.Q6_MIN,
    "Q6_K": Format.Q6_16,
}
"""By the file's format. The products of two scales that _K formats have are rounded to float16 (1 part in 2048)."""
NIBBLES = {"Q4_0": 2, "Q4_1": 4}
"""Formats whose codes lie in a block as the kernel has them: where they begin, after a scale and maybe a minimum."""
_CHUNK = 2**19
"""Numbers taken apart at a time: their temporaries stay in the cache, and threads have something to share."""
_MAX_THREADS = 16


class GGUF(PackedScheme):
    """Scheme: a part in one of `keeps` stays in its format, another one is held as floats."""

    keeps = frozenset(FORMATS)

    def pack(self, tensor: Tensor | Blocks, dtype: torch.dtype) -> Packed | Tensor:
        if isinstance(tensor, Tensor):
            return tensor.to(dtype, copy=True)
        _compile_soon(FORMATS[tensor.type])
        step = max(_CHUNK // tensor.shape[1] // quant_linear.PANEL, 1) * quant_linear.PANEL
        chunks = torch.split(tensor.data, step)
        pack = partial(_pack, tensor.type, tensor.shape[1])
        return quant_linear.stack(list((_pool().map if len(chunks) > 1 else map)(pack, chunks)))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads start once for all matrices."""
    return ThreadPoolExecutor(min(cpu_count() or 1, _MAX_THREADS), "pack")


_compile_soon = functools.cache(quant_linear.compile_soon)


def _pack(type_name: str, columns: int, rows: Tensor) -> Packed:
    blocks = np.ascontiguousarray(rows.numpy()).reshape(-1, block_of(type_name)[1])
    format = FORMATS[type_name]
    if (at := NIBBLES.get(type_name)) is not None:
        outs = rows.shape[0]
        numbers = np.ascontiguousarray(blocks[:, :at]).view(np.float16).reshape(outs, -1, at // 2)
        lowest = numbers[..., 1] if format.has_min else None
        return quant_linear.pack_nibbles(format, blocks[:, at:].reshape(outs, -1, 16), numbers[..., 0], lowest)
    with np.errstate(invalid="ignore", over="ignore"):
        parts = unpack(blocks, type_name)
    codes = torch.from_numpy(parts.codes).view(-1, columns)
    scales = torch.from_numpy(parts.scales).view(codes.shape[0], -1)
    minima = None if parts.minima is None else torch.from_numpy(parts.minima).view(codes.shape[0], -1)
    assert parts.zero == format.zero
    return quant_linear.pack(format, codes, scales, minima)
