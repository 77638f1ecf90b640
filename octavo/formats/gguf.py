"""Reader of GGUF files (versions 2 and 3, little-endian): metadata and the index of tensors, over one read-only mmap.

Nothing is decoded before it is asked for except the small metadata values, so opening a file costs a walk over its
header. Every count, length and offset is checked against the file's size before it is used. Owns the layout of the
container and the sizes of its number formats; what the metadata means is `gguf_facts`' business, turning blocks into
numbers that of `octavo.weights`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct, unpack_from
from typing import Any, NamedTuple

from octavo.core.errors import ConfigError, UnsupportedModel

# id -> (name, numbers per block, bytes per block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SIZES = {kind: Struct("<" + code).size for kind, code in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
_U32, _U64 = Struct("<I"), Struct("<Q")
_MAX_DIMS = 4
_MAX_NESTING = 4


class GGUFTensor(NamedTuple):
    """Where a tensor lies. `shape` is row-major (slowest dimension first); `offset` counts from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of the metadata that has been walked over, not decoded."""

    kind: int
    count: int
    start: int


class Metadata(Mapping[str, Any]):
    """Key -> int, float, bool, str or list. Arrays are decoded when first read."""

    def __init__(self, reader: _Reader, values: dict[str, Any]) -> None:
        self._reader = reader
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = self._reader.decode(value)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GGUFFile:
    """An open GGUF file. Raises ConfigError for a damaged file, UnsupportedModel for an unknown version or type."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise ConfigError(f"{self.path} has {size} bytes, too few for a GGUF file: download it again")
                self._mmap = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        reader = _Reader(self.path, self._mmap, size)
        version, num_tensors, num_values = reader.preamble()
        self.version: int = version
        self.metadata: Mapping[str, Any] = Metadata(reader, reader.metadata(num_values))
        self.tensors: dict[str, GGUFTensor] = reader.tensors(num_tensors, self._alignment())

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or value < 1 or value & (value - 1) or value > 2**20:
            raise ConfigError(f"{self.path}: general.alignment is {value!r}, not a power of two up to 2**20")
        return value

    def data(self, tensor: GGUFTensor) -> memoryview:
        """The tensor's bytes as they lie in the file, not copied."""
        return memoryview(self._mmap)[tensor.offset : tensor.offset + tensor.nbytes]


class _Reader:
    """A cursor over the header."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def damaged(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged: {what}; download it again")

    def take(self, count: int, what: str) -> int:
        """Moves past `count` bytes; returns where they begin."""
        start = self.at
        if count > self.size - start:
            raise self.damaged(f"{what} at byte {start} needs {count} bytes, the file ends after {self.size - start}")
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.take(8, what))[0])

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.take(length, what)
        return self.text(start, length, what)

    def text(self, start: int, length: int, what: str) -> str:
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {start} is not UTF-8") from None

    def preamble(self) -> tuple[int, int, int]:
        """(version, number of tensors, number of metadata values)."""
        magic = self.data[: self.take(4, "magic") + 4]
        if magic != b"GGUF":
            raise ConfigError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        version = self.u32("version")
        if version not in (2, 3):
            swapped = " (big-endian)" if version in (2 << 24, 3 << 24) else ""
            raise UnsupportedModel(
                f"{self.path} has GGUF version {version}{swapped}; versions 2 and 3, little-endian, are supported: "
                "convert it anew"
            )
        num_tensors, num_values = self.u64("tensor count"), self.u64("metadata count")
        for what, count, least in (("metadata values", num_values, 13), ("tensors", num_tensors, 24)):
            if count * least > self.size:
                raise self.damaged(f"it announces {count} {what}, more than {self.size} bytes can hold")
        return version, num_tensors, num_values

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("metadata key")
            if key in values:
                raise self.damaged(f"metadata key {key!r} occurs twice")
            values[key] = self.value(self.u32(key), key)
        return values

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.skip_array(what, 0)
        if kind not in _SCALARS:
            raise UnsupportedModel(f"{self.path}: metadata {what} has the unknown value type {kind}")
        return unpack_from("<" + _SCALARS[kind], self.data, self.take(_SIZES[kind], what))[0]

    def skip_array(self, what: str, depth: int) -> _Array:
        kind, count = self.u32(what), self.u64(what)
        if kind not in _SIZES or depth == _MAX_NESTING:
            raise UnsupportedModel(f"{self.path}: metadata array {what} has the unknown or too deep value type {kind}")
        array = _Array(kind, count, self.at)
        if count * _SIZES[kind] > self.size - self.at:
            raise self.damaged(f"array {what} announces {count} values, more than the file holds")
        if kind == _STRING:
            self._skip_strings(count, what)
        elif kind == _ARRAY:
            for _ in range(count):
                self.skip_array(what, depth + 1)
        else:
            self.take(count * _SIZES[kind], what)
        return array

    def _skip_strings(self, count: int, what: str) -> None:
        at, data, last, unpack = self.at, self.data, self.size - 8, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise self.damaged(f"array {what} runs past the end of the file")
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise self.damaged(f"array {what} runs past the end of the file")
        self.at = at

    def decode(self, array: _Array) -> list[Any]:
        """The values of an array; its bounds were checked when it was walked over."""
        if array.kind == _STRING:
            return self._strings(array)
        if array.kind == _ARRAY:
            self.at = array.start
            return [self.decode(self.skip_array("nested array", 1)) for _ in range(array.count)]
        return list(unpack_from(f"<{array.count}{_SCALARS[array.kind]}", self.data, array.start))

    def _strings(self, array: _Array) -> list[str]:
        at, data, strings, unpack = array.start, self.data, [], _U64.unpack_from
        try:
            for _ in range(array.count):
                end = at + 8 + unpack(data, at)[0]
                strings.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            raise self.damaged(f"string {len(strings)} of the array at byte {array.start} is not UTF-8") from None
        return strings

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        found: list[GGUFTensor] = [self._tensor() for _ in range(count)]
        base = -(-self.at // alignment) * alignment
        index: dict[str, GGUFTensor] = {}
        for tensor in found:
            if tensor.name in index:
                raise self.damaged(f"tensor {tensor.name!r} occurs twice")
            if tensor.offset % alignment:
                raise self.damaged(f"tensor {tensor.name!r} has offset {tensor.offset}, no multiple of {alignment}")
            offset = base + tensor.offset
            if offset + tensor.nbytes > self.size:
                raise self.damaged(
                    f"tensor {tensor.name!r} ends at byte {offset + tensor.nbytes}, the file at {self.size}"
                )
            index[tensor.name] = tensor._replace(offset=offset)
        return index

    def _tensor(self) -> GGUFTensor:
        """One entry of the index, its offset still relative to the data."""
        name = self.string("tensor name")
        dims = self.u32(name)
        if not 1 <= dims <= _MAX_DIMS:
            raise self.damaged(f"tensor {name!r} has {dims} dimensions, outside 1..{_MAX_DIMS}")
        shape = tuple(self.u64(name) for _ in range(dims))[::-1]
        kind, offset = self.u32(name), self.u64(name)
        if kind not in TYPES:
            raise UnsupportedModel(f"{self.path}: tensor {name!r} has the unknown number format {kind}")
        type_name, block, block_bytes = TYPES[kind]
        if 0 in shape or shape[-1] % block:
            raise self.damaged(f"tensor {name!r} has shape {shape}, which {type_name} blocks of {block} cannot hold")
        return GGUFTensor(name, type_name, shape, offset, prod(shape) // block * block_bytes)
