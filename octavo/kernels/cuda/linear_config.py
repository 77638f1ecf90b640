"""Which kernel multiplies so many rows with a matrix, and how it is launched: fixed per shape, not searched.

`config` chooses for a few rows, `hopper_config` for more on Hopper. `tools/gpu/linear.py` and `linear_hopper.py` there
measure the candidates; what the first finds to beat `_rule` is entered in `TUNED`. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from octavo.kernels.cuda.launch import cdiv

Trigger = Literal[0, 1, 2]
"""When a kernel lets the next one start: 0 at once, 1 when its own input is there, 2 just before it stores."""

MATVEC_ROWS = 4
"""Launches for so many rows multiply by FMA, those for 16 and more on tensor cores."""
SKINNY_ROWS = 32
"""From more rows on, cuBLAS reads the weights as fast."""
SMALL = 1 << 24
"""Elements below which cuBLAS multiplies more than MATVEC_ROWS rows faster."""
PROCESSORS = 132
"""Of the GPUs that launches were measured on."""
HOPPER_PIECE = 64
"""Columns of x and W that a stage of the Hopper kernel holds."""


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


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """A launch: `groups` groups of warps with a [rows, columns] part of a tile each, one below the other.

    `swapped`: the tile's rows are the matrix's and its columns x's. `stages` pieces are in flight; `buffers` pieces of
    a result are under way. `band`: tiles of x's rows that go together.
    """

    swapped: bool
    groups: int
    rows: int
    columns: int
    stages: int
    buffers: int = 2
    band: int = 8

    def tile(self) -> tuple[int, int]:
        """Rows of x and of the matrix that a tile has."""
        tile = (self.groups * self.rows, self.columns)
        return (tile[1], tile[0]) if self.swapped else tile

    def box(self, gated: bool) -> tuple[int, int]:
        """Rows and outputs of y that are written at a time."""
        if self.swapped:
            return min(self.columns, 64), self.rows // 2 if gated else self.rows
        return self.rows, min(self.columns // 2 if gated else self.columns, 64)

    def nbytes(self, gated: bool) -> int:
        """Shared memory, without barriers."""
        rows, outputs = self.box(gated)
        operands = self.stages * (self.groups * self.rows + self.columns) * HOPPER_PIECE
        return 2 * (operands + self.groups * self.buffers * rows * outputs)


@cache
def hopper_config(m: int, n: int, k: int, gated: bool) -> HopperConfig | None:
    """The launch for m rows and an [n, k] matrix; None where cuBLAS is as fast (tools/gpu/linear_hopper.py).

    SwiGLU saves a pass over the product, so gated ones win everywhere; else matrices as large as a vocabulary do, and
    many rows with more outputs than inputs. A wide tile's two halves cost 3% less than two narrow tiles, unless they
    leave more processors idle in the last turn.
    """
    vocabulary, small = n >= 1 << 16, n * k < 1 << 24
    if not (gated or (vocabulary and not 64 < m <= 128) or (m >= 4096 and n > k)):
        return None
    if m <= 64:
        return HopperConfig(True, 1, 64, 64, 12) if small else HopperConfig(True, 2, 128, 64, 4, 1)
    if small and m <= 256:
        return HopperConfig(True, 1, 64, 128, 8) if m <= 128 else HopperConfig(True, 2, 64, 128, 6)
    if m <= 128:
        return HopperConfig(True, 2, 64, 128, 6)
    wide, narrow = (HopperConfig(False, 2, 64, columns, stages, band=16) for columns, stages in ((256, 4), (128, 6)))
    turns = [cdiv(cdiv(m, rows) * cdiv(n, columns), PROCESSORS) for rows, columns in (wide.tile(), narrow.tile())]
    return wide if 1.94 * turns[0] <= turns[1] else narrow
