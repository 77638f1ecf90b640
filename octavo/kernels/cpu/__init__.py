"""Kernels in C for CPUs: the reference's names, with those overridden that a kernel exists for.

Every function can be used on its own on CPU tensors of float32 or bfloat16:

    from octavo.kernels.cpu import add_rms_norm, linear, rms_norm, rope_norm_write_kv, sample, silu_mul
    y = linear(x, weight, None)

Other dtypes and layouts go to the reference. The C sources beside this file are compiled at first use (`build`); where
that fails the functions raise build.BuildError, hence `build.available` before.
"""

from __future__ import annotations

from octavo.kernels.cpu.layers import (
    add_rms_norm,
    gated_linear,
    linear,
    norm_linear,
    rms_norm,
    rope_norm_write_kv,
    silu_mul,
)
from octavo.kernels.cpu.sampling import apply_masks, sample, sample_rows
from octavo.kernels.cpu.step import embedding, prepare_decode, rotation
from octavo.kernels.reference import add_linear, apply_diffs, apply_penalties, slots, top_logprobs, verify

__all__ = [
    "add_linear",
    "add_rms_norm",
    "apply_diffs",
    "apply_masks",
    "apply_penalties",
    "embedding",
    "gated_linear",
    "linear",
    "norm_linear",
    "prepare_decode",
    "rms_norm",
    "rope_norm_write_kv",
    "rotation",
    "sample",
    "sample_rows",
    "silu_mul",
    "slots",
    "top_logprobs",
    "verify",
]
