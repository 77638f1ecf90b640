"""A quantized matrix on its way from a file to a scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.quant.gguf_blocks import block_of


class Stored(Protocol):
    """A vector or matrix on its way from a file; only what is cut out of it need be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in numbers."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor | Blocks:
        """Ranges of numbers, one for each dimension; ConfigError where they cut what cannot be cut."""


@dataclass(frozen=True)
class Blocks:
    """A matrix as a GGUF file has it: rows of blocks."""

    type: str
    """Name of the number format: "Q4_0", ..."""
    data: Tensor
    """uint8 [rows, bytes of a row]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), in numbers."""
        size, nbytes = block_of(self.type)
        return self.data.shape[0], self.data.shape[1] // nbytes * size

    def __getitem__(self, index: tuple[slice, ...], /) -> Blocks:
        """Rows and columns, counted in numbers; ConfigError where a range of columns cuts a block."""
        rows, columns = index
        return Blocks(self.type, self.data[rows, whole_blocks(self.type, self.shape[1], columns)])


def whole_blocks(type_name: str, columns: int, cut: slice) -> slice:
    """Bytes of `cut` of a row of `columns` numbers; ConfigError where a block is cut."""
    size, nbytes = block_of(type_name)
    start, stop, _ = cut.indices(columns)
    if start % size or stop % size:
        blocks = columns // size
        works = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
        raise ConfigError(
            f"{columns} inputs in {type_name}, blocks of {size}, cannot be cut at {start}:{stop}: take a"
            f" --tensor-parallel-size of {works}, or --quantization none"
        )
    return slice(start // size * nbytes, stop // size * nbytes)
