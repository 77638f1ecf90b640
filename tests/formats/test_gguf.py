from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.core.errors import ConfigError, OctavoError, UnsupportedModel
from octavo.formats.gguf import TYPES, GGUFFile

Maker = Callable[..., Path]
VALUES: dict[str, Any] = {
    "u8": ("u8", 200),
    "i8": ("i8", -100),
    "u16": ("u16", 60000),
    "i16": ("i16", -30000),
    "u32": ("u32", 2**32 - 1),
    "i32": ("i32", -(2**31)),
    "u64": ("u64", 2**64 - 1),
    "i64": ("i64", -(2**63)),
    "f32": ("f32", 0.5),
    "f64": ("f64", 1e300),
    "yes": ("bool", True),
    "text": "größer",
    "empty": "",
}
TENSORS = {"a.weight": (0, (2, 3), bytes(24)), "b.weight": (3, (1, 64), bytes(range(40))), "c": (1, (5,), bytes(10))}


def everything(file: GGUFFile) -> dict[str, Any]:
    return {key: file.metadata[key] for key in file.metadata}


def test_every_value_type(make_gguf: Maker) -> None:
    file = GGUFFile(make_gguf(VALUES, {}))
    assert everything(file) == {k: v[1] if isinstance(v, tuple) else v for k, v in VALUES.items()}


def test_arrays_of_every_type(make_gguf: Maker) -> None:
    arrays = {k: (v[0], [v[1]] * 3) if isinstance(v, tuple) else [v, "x"] for k, v in VALUES.items()}
    file = GGUFFile(make_gguf(arrays, {}))
    assert everything(file) == {k: v[1] if isinstance(v, tuple) else v for k, v in arrays.items()}


def test_nested_arrays_leave_what_follows_readable(make_gguf: Maker) -> None:
    nested = [["a", "bc"], ["d"]]
    file = GGUFFile(make_gguf({"nested": nested, "after": 7}, TENSORS))
    assert file.metadata["after"] == 7
    assert file.metadata["nested"] == nested
    assert list(file.tensors) == list(TENSORS)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_tensors(make_gguf: Maker, version: int, alignment: int) -> None:
    path = make_gguf({"general.alignment": alignment}, TENSORS, version=version, alignment=alignment)
    file = GGUFFile(path)
    assert file.version == version
    for name, (kind, shape, data) in TENSORS.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.type, tensor.shape) == (name, TYPES[kind][0], shape)
        assert tensor.offset % alignment == 0
        assert bytes(file.data(tensor)) == data


def test_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_token_list(["a", "b", "ç"])
    writer.add_token_scores([0.0, -1.0, 2.5])
    writer.add_add_bos_token(True)
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("m", matrix)
    writer.add_tensor("h", matrix.astype(np.float16)[:2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.context_length"] == 4096
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ç"]
    assert file.metadata["tokenizer.ggml.scores"] == [0.0, -1.0, 2.5]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.tensors["m"].shape == (3, 4)
    assert bytes(file.data(file.tensors["m"])) == matrix.tobytes()
    assert bytes(file.data(file.tensors["h"])) == matrix.astype(np.float16)[:2].tobytes()


def test_sizes_of_number_formats_are_those_of_the_reference() -> None:
    reference = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert all(reference[kind] == entry for kind, entry in TYPES.items())
    assert len(TYPES) > 25


def test_truncation_is_refused(make_gguf: Maker, tmp_path: Path) -> None:
    whole = make_gguf({**VALUES, "list": ["a", "b"], "numbers": ("i32", [1, 2])}, TENSORS).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 3):
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            GGUFFile(cut)


def header(tensors: int = 0, values: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def key(kind: int, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + rest


def tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return struct.pack(f"<Q1sI{len(dims)}QIQ", 1, name, len(dims), *dims, kind, offset)


HUGE = 2**63
HOSTILE = {
    "empty": (b"", "too few"),
    "magic": (b"GGML" + bytes(40), "no GGUF"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "values": (header(values=HUGE), "announces"),
    "tensors": (header(tensors=HUGE), "announces"),
    "string": (header(values=1, rest=key(8, struct.pack("<Q", HUGE))), "needs"),
    "value type": (header(values=1, rest=key(13, bytes(8))), "value type 13"),
    "array": (header(values=1, rest=key(9, struct.pack("<IQ", 4, HUGE))), "announces"),
    "array type": (header(values=1, rest=key(9, struct.pack("<IQ", 99, 1) + bytes(9))), "value type 99"),
    "strings": (header(values=1, rest=key(9, struct.pack("<IQQ", 8, 2, 2**64 - 9) + bytes(32))), "past the end"),
    "nesting": (header(values=1, rest=key(9, struct.pack("<IQ", 9, 1) * 20)), "too deep"),
    "utf-8": (header(values=1, rest=key(8, struct.pack("<Q2s", 2, b"\xff\xfe"))), "UTF-8"),
    "twice": (header(values=2, rest=key(0, b"\0") + key(0, b"\0")), "twice"),
    "dimensions": (header(tensors=1, rest=tensor((1,) * 5)), "5 dimensions"),
    "no dimension": (header(tensors=1, rest=tensor(()) + bytes(99)), "0 dimensions"),
    "zero": (header(tensors=1, rest=tensor((0, 4)) + bytes(99)), "shape"),
    "format": (header(tensors=1, rest=tensor((4,), kind=5) + bytes(99)), "number format 5"),
    "row": (header(tensors=1, rest=tensor((33,), kind=2) + bytes(99)), "blocks of 32"),
    "size": (header(tensors=1, rest=tensor((2**62, 2**62, 2**62)) + bytes(99)), "ends at byte"),
    "offset": (header(tensors=1, rest=tensor((4,), offset=2**62) + bytes(99)), "ends at byte"),
    "alignment": (header(tensors=1, rest=tensor((4,), offset=4) + bytes(99)), "no multiple of 32"),
    "tensor twice": (header(tensors=2, rest=tensor((4,)) * 2 + bytes(99)), "twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    data, fault = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=fault) as caught:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "hostile.gguf" in str(caught.value)


@pytest.mark.parametrize("alignment", [0, 3, 2**21, "32"])
def test_bad_alignment(make_gguf: Maker, alignment: object) -> None:
    with pytest.raises(ConfigError, match="alignment"):
        GGUFFile(make_gguf({"general.alignment": alignment}, {}))


def test_invalid_token_text_is_found_when_read(make_gguf: Maker) -> None:
    path = make_gguf({"tokens": ["good", "evil"]}, {})
    path.write_bytes(path.read_bytes().replace(b"evil", b"\xffvil"))
    file = GGUFFile(path)
    with pytest.raises(ConfigError, match="string 1"):
        file.metadata["tokens"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.gguf cannot be read"):
        GGUFFile(tmp_path / "no.gguf")


def test_unknown_format_and_version_are_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    for name in ("version", "format", "value type"):
        path.write_bytes(HOSTILE[name][0])
        with pytest.raises(UnsupportedModel):
            GGUFFile(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_crash(make_gguf: Maker, data: st.DataObject) -> None:
    metadata = {**VALUES, "strings": ["ab", "c"], "nested": [["x"], ["y", "z"]], "numbers": ("f32", [1.0, 2.0])}
    path = make_gguf(metadata, TENSORS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(OctavoError):
        file = GGUFFile(path)
        everything(file)
        assert all(len(file.data(tensor)) == tensor.nbytes for tensor in file.tensors.values())
