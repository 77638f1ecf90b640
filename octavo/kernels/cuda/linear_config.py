"""Which kernel multiplies a few rows with a matrix, and how it is launched: fixed per shape, not searched.

`tools/gpu/linear.py` measures the candidates; what it finds to beat `_rule` is entered in `TUNED`. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Trigger = Literal[0, 1, 2]
"""When a kernel lets the next one start: 0 at once, 1 when its own input is there, 2 just before it stores."""

MATVEC_ROWS = 4
"""Launches for so many rows multiply by FMA, those for 16 and more on tensor cores."""
SKINNY_ROWS = 32
"""From more rows on, cuBLAS reads the weights as fast."""
SMALL = 1 << 24
"""Elements below which cuBLAS multiplies more than MATVEC_ROWS rows faster."""


@dataclass(frozen=True, slots=True)
class Config:
    """A launch for at most `rows` rows: a program owns `block_n` rows of the matrix, `block_k` columns a piece.

    `stages` pieces of weights are in flight (matvec: in registers, the first of them from before the kernel waits for
    its input; `block_k` is a multiple of 256 * `warps`, or pieces are rearranged through shared memory). `split`:
    programs that share a sum over columns; `groups`: groups of warps that do (1 or `warps`). Both are 1 for matvec.
    """

    rows: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 1
    split: int = 1
    groups: int = 1
    trigger: Trigger = 1


def rows_class(m: int) -> int:
    """The class of m >= 1 rows: 1, 2, 4, 16, 32, ..."""
    for rows in (1, 2, MATVEC_ROWS, 16):
        if m <= rows:
            return rows
    return 1 << (m - 1).bit_length()


TUNED: dict[tuple[int, int, int], Config | None] = {
    (1, 6144, 4096): Config(1, 4, 2048, 8, 2),
    (1, 4096, 14336): Config(1, 1, 512, 2, 4),
    (16, 6144, 4096): Config(16, 64, 128, 4, 4),
    (32, 6144, 4096): Config(32, 64, 128, 4, 4),
    (32, 4096, 4096): Config(32, 64, 256, 4, 3, 2),
}
"""(rows class, N, K) of an [N, K] matrix -> its launch, or None for cuBLAS, where measured to beat `_rule`."""


@cache
def config(m: int, n: int, k: int, gated: bool = False) -> Config | None:
    """The launch for m rows and an [n, k] matrix; None where cuBLAS is as fast. A gated one takes rows in pairs."""
    rows = rows_class(m)
    if (rows, n, k) in TUNED:
        tuned = TUNED[rows, n, k]
        if tuned is None or not (gated and tuned.block_n == 1):
            return tuned
    if m > SKINNY_ROWS or k % 8 or (m > MATVEC_ROWS and n * k < SMALL):
        return None
    return _rule(rows, n, k)


def _rule(rows: int, n: int, k: int) -> Config:
    if rows < MATVEC_ROWS:
        block_k = 1024 if k <= 8192 else 2048
        block_n = 2 if n <= 4096 or rows == 2 else 4
        return Config(rows, block_n, block_k, block_k // 256, stages=1 if k <= block_k else 2)
    tile = max(rows, 16)
    if tile <= 32 and n * k <= 1 << 23:
        block_n, block_k, groups = 32, 256, 4
    else:
        block_n, block_k, groups = (64, 128, 1) if tile <= 32 else (128, 64, 1)
    split = 1
    while split < 8 and -(-n // block_n) * split < 200 and k >= 4 * split * block_k:
        split *= 2
    return Config(tile, block_n, block_k, stages=4, split=split, groups=groups)
