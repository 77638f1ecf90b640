"""Which scheme a model's weights get."""

from __future__ import annotations

from typing import Literal

import torch

from octavo.core.errors import ConfigError
from octavo.quant.dense import Dense
from octavo.quant.scheme import Scheme

Quantization = Literal["auto", "native", "none", "int8"]


def scheme_for(
    quantization: Quantization,
    *,
    files: Literal["gguf", "safetensors", "none"],
    device_kind: str,
    dtype: torch.dtype,
) -> Scheme:
    """The scheme for weights read from `files` ("none": random ones) and computed with in `dtype`.

    none: floats. native: a GGUF file's own formats. int8: rounded at load. These two need a CPU with a C compiler and
    float32 or bfloat16; raises ConfigError where they cannot be had. auto: native, or floats where it has no kernels.
    """
    if quantization == "none":
        return Dense()
    if device_kind != "cpu":
        raise ConfigError(f"quantization {quantization} is for CPUs, not {device_kind}: use none")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"quantization {quantization} computes in float32 or bfloat16, not {dtype}: change dtype")
    if files == "none":
        raise ConfigError(f"quantization {quantization} needs weights, and these are random: use none")
    if quantization == "native" and files != "gguf":
        raise ConfigError(
            f"quantization native keeps a GGUF file's formats, and this model has {files}: use none or int8"
        )
    from octavo.kernels.cpu import quant_linear
    from octavo.kernels.cpu.quant_linear import Format

    if (reason := quant_linear.available()) is not None:
        if quantization == "auto":
            return Dense()
        raise ConfigError(f"quantization {quantization} needs compiled kernels: {reason}")
    if quantization == "int8":
        if not quant_linear.multiplies(Format.Q8):
            raise ConfigError("quantization int8 needs compiled kernels, and they do not compile: use none")
        from octavo.quant.int8 import Int8

        return Int8()
    from octavo.quant.gguf import GGUF

    return GGUF()
