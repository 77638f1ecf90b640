"""Makers of small checkpoint files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

GGUFMaker = Callable[..., Path]
DirectoryMaker = Callable[..., Path]

CODES = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
         "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}  # fmt: skip


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _scalar_type(value: object) -> str:
    return "bool" if isinstance(value, bool) else "u32" if isinstance(value, int) else "f32"


def _value(value: Any, kind: str | None = None) -> tuple[int, bytes]:
    """(type id, bytes) of a metadata value; `kind` picks the type of numbers."""
    if isinstance(value, str):
        return 8, _string(value)
    if isinstance(value, list):
        items = [_value(item, kind) for item in value]
        return 9, struct.pack("<IQ", items[0][0] if items else 8, len(items)) + b"".join(data for _, data in items)
    number, code = CODES[kind or _scalar_type(value)]
    return number, struct.pack("<" + code, value)


@pytest.fixture
def make_gguf(tmp_path: Path) -> GGUFMaker:
    """make(metadata, {name: (type id, shape row-major, bytes)}): a .gguf file, packed by hand.

    A metadata value may be a tuple (kind of CODES, value).
    """

    def make(
        metadata: Mapping[str, Any],
        tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
        *,
        version: int = 3,
        alignment: int = 32,
        name: str = "model.gguf",
    ) -> Path:
        out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
        for key, value in metadata.items():
            kind, data = _value(value[1], value[0]) if isinstance(value, tuple) else _value(value)
            out += _string(key) + struct.pack("<I", kind) + data
        payload = b""
        for key, (kind, shape, data) in tensors.items():
            payload += b"\0" * (-len(payload) % alignment)
            out += _string(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(payload))
            payload += data
        out += b"\0" * (-len(out) % alignment) + payload
        path = tmp_path / name
        path.write_bytes(out)
        return path

    return make


@pytest.fixture
def make_directory(tmp_path: Path) -> DirectoryMaker:
    """make(config, **{"a_b_json": content}): a model directory; each keyword is a JSON file, here a_b.json."""

    def make(config: Mapping[str, Any], **files: Any) -> Path:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        for name, content in {"config_json": config, **files}.items():
            (directory / (name.removesuffix("_json") + ".json")).write_text(json.dumps(content))
        return directory

    return make
