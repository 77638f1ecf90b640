"""Which rows and columns of a matrix a rank holds: pure slice arithmetic, before anything is read.

A layout describes a Linear of one or more parts that a checkpoint stores separately and a rank holds stacked along the
output (query, key, value; gate, up). Sizes are counted in elements of the [out, in] matrix; `Slice.index` turns them
into indices of a stored tensor whose entries cover several elements each (scales per group, packed words).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from octavo.core.errors import ConfigError


@dataclass(frozen=True)
class Slice:
    """Half-open ranges of a matrix's rows (outputs) and columns (inputs), in elements."""

    out: tuple[int, int]
    in_: tuple[int, int]

    def index(self, granularity: tuple[int, int] = (1, 1)) -> tuple[slice, slice]:
        """Indices into a tensor with one entry for every granularity[0] x granularity[1] elements."""
        return _range(self.out, granularity[0]), _range(self.in_, granularity[1])


def _range(span: tuple[int, int], granularity: int) -> slice:
    start, stop = span
    if start % granularity or stop % granularity:
        raise ConfigError(
            f"cannot cut weights at {start}:{stop}, their format groups {granularity}; lower --tensor-parallel-size"
        )
    return slice(start // granularity, stop // granularity)


class Layout(Protocol):
    """How `size` ranks split a Linear with the named parts."""

    @property
    def parts(self) -> dict[str, int]:
        """Name and full output size of each part, in the order in which a rank stacks them."""

    partial: bool
    """Whether ranks compute partial sums of the whole output, to be reduced."""

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        """What `rank` reads of the part's full matrix."""


def share(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    """The rank's equal share of 0..total; ConfigError where it does not divide."""
    if total % size:
        raise ConfigError(f"{total} {what} cannot be split over {size} ranks; change --tensor-parallel-size")
    return total // size * rank, total // size * (rank + 1)


@dataclass(frozen=True)
class Column:
    """Each part's outputs are split evenly."""

    parts: dict[str, int]
    partial = False

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        return Slice(share(self.parts[part], rank, size, f"outputs of {part!r}"), (0, in_features))


@dataclass(frozen=True)
class Row:
    """Inputs are split evenly; the outputs are partial sums."""

    parts: dict[str, int]
    partial = True

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        return Slice((0, self.parts[part]), share(in_features, rank, size, f"inputs of {part!r}"))


@dataclass(frozen=True)
class Vocabulary:
    """Outputs are split into runs of equal length, of which the last ranks' may be cut short."""

    parts: dict[str, int]
    partial = False

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        total = self.parts[part]
        run = -(-total // size)
        return Slice((min(rank * run, total), min((rank + 1) * run, total)), (0, in_features))


@dataclass(frozen=True)
class Replicated:
    """Every rank holds everything."""

    parts: dict[str, int]
    partial = False

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        return Slice((0, self.parts[part]), (0, in_features))


@dataclass(frozen=True)
class Heads:
    """Parts q, k, v of attention, split by whole heads; with more ranks than KV heads, several hold the same one."""

    q: int
    kv: int
    dim: int
    partial = False

    @property
    def parts(self) -> dict[str, int]:
        return {"q": self.q * self.dim, "k": self.kv * self.dim, "v": self.kv * self.dim}

    def read(self, part: str, in_features: int, rank: int, size: int) -> Slice:
        if part == "q":
            first, last = share(self.q, rank, size, "query heads")
        elif size > self.kv:
            copies = size // self.kv
            if size % self.kv:
                raise ConfigError(f"{self.kv} KV heads cannot be shared by {size} ranks; change --tensor-parallel-size")
            first, last = rank // copies, rank // copies + 1
        else:
            first, last = share(self.kv, rank, size, "KV heads")
        return Slice((first * self.dim, last * self.dim), (0, in_features))
