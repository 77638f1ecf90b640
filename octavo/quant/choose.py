"""Which scheme a model's weights get."""

from __future__ import annotations

from typing import Literal

import torch

from octavo.core.errors import ConfigError
from octavo.quant.dense import Dense
from octavo.quant.scheme import Scheme

Quantization = Literal["auto", "none", "int8"]


def scheme_for(
    quantization: Quantization,
    *,
    files: Literal["gguf", "safetensors", "none"],
    device_kind: str,
    dtype: torch.dtype,
) -> Scheme:
    """The scheme for weights read from `files` ("none": random ones) and computed with in `dtype`.

    none: floats. auto: a GGUF file's own formats where kernels multiply them, which is on a CPU with a C compiler, in
    float32 or bfloat16; otherwise floats. int8: rounded at load, ConfigError where that has no kernel.
    """
    if quantization == "none":
        return Dense()
    if quantization == "auto":
        if files != "gguf" or device_kind != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return Dense()
        from octavo.kernels.cpu import quant_linear

        if quant_linear.available() is not None:
            return Dense()
        from octavo.quant.gguf import GGUF

        return GGUF()
    return _int8(files, device_kind, dtype)


def _int8(files: str, device_kind: str, dtype: torch.dtype) -> Scheme:
    if device_kind != "cpu":
        raise ConfigError(f"quantization int8 is for CPUs, not {device_kind}: use auto")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"quantization int8 computes in float32 or bfloat16, not {dtype}: change dtype")
    if files == "none":
        raise ConfigError("quantization int8 needs weights to round, and these are random: use none")
    from octavo.kernels.cpu import quant_linear

    if (reason := quant_linear.available()) is not None:
        raise ConfigError(f"quantization int8 needs compiled kernels: {reason}")
    from octavo.quant.int8 import Int8

    return Int8()
