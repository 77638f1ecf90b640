"""Index of a directory of safetensors files, read from their headers: no weight is touched.

Owns which files of a directory make up the checkpoint and what each tensor looks like. Reading the numbers is the
business of `octavo.weights`.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from octavo.core.errors import ConfigError, UnsupportedModel

_MAX_HEADER = 100_000_000
"""The format's own limit on the header, in bytes."""

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class SafetensorsTensor(NamedTuple):
    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class SafetensorsIndex:
    """`tensors`: name -> where and what, in file order.

    The files are those of model.safetensors.index.json, else model.safetensors, else every *.safetensors but Mistral's
    consolidated copies. Raises ConfigError for a damaged or missing file, UnsupportedModel for an unknown dtype.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, SafetensorsTensor] = {}
        for file, names in _files(self.directory).items():
            header = _read_header(file)
            for name in header if names is None else names:
                if name not in header:
                    raise ConfigError(f"{file} lacks the tensor {name} that the index places there: download it again")
                if name in self.tensors:
                    raise ConfigError(
                        f"tensor {name} is in {self.tensors[name].file.name} and in {file.name}: remove one"
                    )
                self.tensors[name] = header[name]

    @property
    def files(self) -> dict[Path, list[SafetensorsTensor]]:
        """Tensors by file, both in order."""
        grouped: dict[Path, list[SafetensorsTensor]] = {}
        for tensor in self.tensors.values():
            grouped.setdefault(tensor.file, []).append(tensor)
        return grouped


def weight_files(directory: Path) -> list[Path]:
    """The *.safetensors files that can make up a checkpoint; empty when there are none."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    return sorted(f for f in directory.glob("*.safetensors") if not f.name.startswith("consolidated"))


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """File -> names wanted from it, None for all."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        files = weight_files(directory)
        if not files:
            raise ConfigError(f"{directory} holds no *.safetensors file")
        return dict.fromkeys(files)
    weight_map = _weight_map(index)
    wanted: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ConfigError(f"{index} names {file!r}, which is no file beside it")
        if not (directory / file).is_file():
            raise ConfigError(f"{directory / file} is missing, {index.name} names it: download it")
        wanted[directory / file] = [name for name, place in weight_map.items() if place == file]
    return wanted


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is no index of safetensors files ({error!r}): download it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{index}: weight_map does not map names to files: download it again")
    return weight_map


def _read_header(file: Path) -> dict[str, SafetensorsTensor]:
    """Header: 8 bytes little-endian length, JSON of that length, then the data."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ConfigError(f"{file} is damaged: {size} bytes, a header of {length}; download it again")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is damaged: its header is no JSON; download it again") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{file} is damaged: its header is no table; download it again")
    header.pop("__metadata__", None)
    data = size - 8 - length
    tensors = [_entry(file, name, entry, data) for name, entry in header.items()]
    return {tensor.name: tensor for tensor in tensors}


def _entry(file: Path, name: str, entry: Any, data: int) -> SafetensorsTensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = 0 <= start <= end <= data and all(isinstance(n, int) and n >= 0 for n in shape)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ConfigError(f"{file} is damaged: its entry for {name} is {str(entry)[:200]}; download it again")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"{file}: tensor {name} has the unknown dtype {dtype!r}")
    if prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise ConfigError(f"{file} is damaged: {name} of shape {shape} has {end - start} bytes; download it again")
    return SafetensorsTensor(name, file, dtype, shape, end - start)
