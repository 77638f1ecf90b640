"""Triton kernels for NVIDIA GPUs: the reference's names, with those overridden that a kernel exists for.

Every function can be used on its own on CUDA tensors of bfloat16, float16 or float32:

    from octavo.kernels.cuda import add_rms_norm, log_softmax, rms_norm, rope_norm_write_kv, silu_mul
    y = rms_norm(x, weight, 1e-6)

Other dtypes, layouts and shapes go to the reference, which raises for what it does not take. Nothing records
gradients. Nothing waits for the device; all can be captured in a CUDA graph.
"""

from __future__ import annotations

from octavo.kernels.cuda.activation import embedding, silu_mul
from octavo.kernels.cuda.batch import apply_diffs, prepare_decode
from octavo.kernels.cuda.linear import add_linear, gated_linear, linear, norm_linear
from octavo.kernels.cuda.logprobs import log_softmax, top_logprobs
from octavo.kernels.cuda.norm import add_rms_norm, rms_norm
from octavo.kernels.cuda.rope import rope_norm_write_kv, rotation
from octavo.kernels.cuda.sampling import sample, sample_rows
from octavo.kernels.reference import apply_masks, apply_penalties, slots, verify

__all__ = [
    "add_linear",
    "add_rms_norm",
    "apply_diffs",
    "apply_masks",
    "apply_penalties",
    "embedding",
    "gated_linear",
    "linear",
    "log_softmax",
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
