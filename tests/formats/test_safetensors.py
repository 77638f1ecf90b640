from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.formats.safetensors import SafetensorsIndex

A, B = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)


def write(path: Path, header: object, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_single_file(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file({"c": A}, tmp_path / "other.safetensors")
    tensors = SafetensorsIndex(tmp_path).tensors
    assert {(t.name, t.dtype, t.shape, t.nbytes) for t in tensors.values()} == {
        ("a", "F32", (2, 3), 24),
        ("b", "BF16", (4,), 8),
    }


def test_several_files_without_index_leave_out_consolidated_copies(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "part-1.safetensors")
    save_file({"b": B}, tmp_path / "part-2.safetensors")
    save_file({"x": B}, tmp_path / "consolidated.safetensors")
    index = SafetensorsIndex(tmp_path)
    assert {name: t.file.name for name, t in index.tensors.items()} == {
        "a": "part-1.safetensors",
        "b": "part-2.safetensors",
    }
    assert [file.name for file in index.files] == ["part-1.safetensors", "part-2.safetensors"]


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_index_decides(tmp_path: Path) -> None:
    save_file({"a": A, "stale": B}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    save_file({"a": A}, tmp_path / "three.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert list(SafetensorsIndex(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({"a": "absent.safetensors"}, r"absent\.safetensors is missing"),
        ({"b": "one.safetensors"}, "lacks the tensor b"),
        ({"a": "../one.safetensors"}, "no file beside it"),
        ({"a": 1}, "does not map"),
        (["a"], "does not map"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, fault: str) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(ConfigError, match=fault):
        SafetensorsIndex(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense"])
def test_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json is no index"):
        SafetensorsIndex(tmp_path)


def test_a_name_in_two_files(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"a": A}, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"tensor a is in x\.safetensors and in y\.safetensors"):
        SafetensorsIndex(tmp_path)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xff", "no JSON"),
        ([], "no table"),
        ({"t": 1}, "entry for t"),
        ({"t": {"dtype": "F32"}}, "entry for t"),
        (entry("F32", [1], 0, 400), "entry for t"),
        (entry("F32", [1], -4, 0), "entry for t"),
        (entry("F32", [-1], 0, 4), "entry for t"),
        (entry("F32", [2], 0, 4), "has 4 bytes"),
    ],
)
def test_damaged_header(tmp_path: Path, header: object, fault: str) -> None:
    write(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ConfigError, match=fault) as caught:
        SafetensorsIndex(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_unknown_dtype(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", entry("F3", [1], 0, 4), bytes(8))
    with pytest.raises(UnsupportedModel, match="F3"):
        SafetensorsIndex(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\1\0", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_damaged_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        SafetensorsIndex(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        SafetensorsIndex(tmp_path)
