"""A quantized matrix on its way from a file to a scheme."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.quant.gguf_blocks import block_of


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

    def __getitem__(self, index: tuple[slice, slice]) -> Blocks:
        """Rows and columns, counted in numbers; ConfigError where a range of columns cuts a block."""
        size, nbytes = block_of(self.type)
        start, stop, _ = index[1].indices(self.shape[1])
        if start % size or stop % size:
            raise ConfigError(
                f"cannot cut weights at {start}:{stop}, {self.type} groups {size}; lower --tensor-parallel-size"
            )
        return Blocks(self.type, self.data[index[0], start // size * nbytes : stop // size * nbytes])
