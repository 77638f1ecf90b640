from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.core.errors import ConfigError
from octavo.kernels.cpu import quant_linear
from octavo.quant import scheme_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_linear, "available", lambda: None)
    monkeypatch.setattr(quant_linear, "multiplies", lambda format: True)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_linear, "available", lambda: "no C compiler found")


def name(quantization: Any, files: Any, device_kind: str, dtype: torch.dtype) -> str:
    return type(scheme_for(quantization, files=files, device_kind=device_kind, dtype=dtype)).__name__


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("quantization", "files", "device", "dtype", "chosen"),
    [
        ("native", "gguf", "cpu", F32, "GGUF"),
        ("native", "gguf", "cpu", BF16, "GGUF"),
        ("auto", "gguf", "cpu", F32, "GGUF"),
        ("none", "gguf", "cpu", F32, "Dense"),
        ("none", "gguf", "cuda", BF16, "Dense"),
        ("int8", "gguf", "cpu", F32, "Int8"),
        ("int8", "safetensors", "cpu", BF16, "Int8"),
    ],
)
def test_choice(quantization: str, files: str, device: str, dtype: torch.dtype, chosen: str) -> None:
    assert name(quantization, files, device, dtype) == chosen


@pytest.mark.usefixtures("not_compiled")
def test_without_a_compiler() -> None:
    for without in ("none", "auto"):
        assert name(without, "gguf", "cpu", F32) == "Dense"
    for quantization in ("native", "int8"):
        with pytest.raises(ConfigError, match="no C compiler found"):
            name(quantization, "gguf", "cpu", F32)


@pytest.mark.usefixtures("compiled")
def test_int8_is_refused_where_products_of_8_bits_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_linear, "multiplies", lambda format: format is not quant_linear.Format.Q8)
    assert name("native", "gguf", "cpu", F32) == "GGUF"
    with pytest.raises(ConfigError, match="use none"):
        name("int8", "safetensors", "cpu", F32)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("quantization", ["native", "int8"])
@pytest.mark.parametrize(
    ("files", "device", "dtype", "message"),
    [("gguf", "cuda", BF16, "not cuda"), ("gguf", "cpu", F16, "float16"), ("none", "cpu", F32, "random")],
)
def test_a_refusal_has_its_reason(quantization: str, files: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        name(quantization, files, device, dtype)


@pytest.mark.usefixtures("compiled")
def test_native_formats_are_those_of_gguf() -> None:
    with pytest.raises(ConfigError, match="this model has safetensors"):
        name("native", "safetensors", "cpu", F32)
