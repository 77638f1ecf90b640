"""Rotary position embedding (arXiv:2104.09864) and the published ways to stretch it to longer contexts.

Frequencies are computed in float32, as the models were trained, and in float64 for a float64 model. Angles are computed
once per step from the positions, for all layers: no table, hence no longest position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.attention import Rotation
from octavo.core.facts import RopeFacts
from octavo.layers.build import Build


class Rope:
    """positions [T] int64 -> the step's rotation (cos, sin)."""

    def __init__(self, rope: RopeFacts, build: Build) -> None:
        dtype = torch.float64 if build.dtype == torch.float64 else torch.float32
        self._kernels = build.kernels
        self._dynamic = rope if rope.kind == "dynamic" else None
        self._inv_freq = inverse_frequencies(rope, dtype).to(build.device)
        self._scale = attention_factor(rope)

    def __call__(self, positions: Tensor) -> Rotation:
        inv_freq = self._inv_freq
        if self._dynamic is not None:
            inv_freq = dynamic_frequencies(self._dynamic, positions, inv_freq)
        return self._kernels.rotation(positions, inv_freq, self._scale)


def inverse_frequencies(rope: RopeFacts, dtype: torch.dtype) -> Tensor:
    """[rotary_dim / 2] radians per position; for "dynamic" those within the original context."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=dtype) / rope.rotary_dim
    inv_freq = 1.0 / rope.theta**exponents
    match rope.kind:
        case "linear":
            return inv_freq / rope.factor
        case "llama3":
            return _llama3(inv_freq, rope)
        case "yarn":
            return _yarn(inv_freq, rope)
        case _:
            return inv_freq


def _llama3(inv_freq: Tensor, rope: RopeFacts) -> Tensor:
    """Llama 3.1's: long wavelengths slow down by `factor`, short ones stay, those between are interpolated.

    With r = original_max_position / wavelength: s = (r - low) / (high - low), clipped to 0..1, and the frequency is
    multiplied by (1 - s) / factor + s (published with the weights, github.com/meta-llama/llama-models).
    """
    turns = rope.original_max_position / (2 * math.pi / inv_freq)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(inv_freq: Tensor, rope: RopeFacts) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): "NTK by parts".

    Pairs that turn more than beta_fast times within the original context stay, those below beta_slow are slowed by
    `factor`; between them a linear ramp over the pair's index. A pair turning n times has the index
    d * ln(original / (2 pi n)) / (2 ln theta).
    """

    def index(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    pairs = torch.arange(len(inv_freq), dtype=inv_freq.dtype)
    slowed = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return inv_freq / rope.factor * slowed + inv_freq * (1 - slowed)


def dynamic_frequencies(rope: RopeFacts, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Dynamic NTK scaling, per position: [T] -> [T, rotary_dim / 2].

    theta' = theta * (factor * L / original - (factor - 1)) ** (d / (d - 2)) for a sequence of L tokens, beyond the
    original context. The published form recomputes it as a sequence grows and keeps the keys already cached, so a whole
    prompt and its tokens one by one give different results. Here L is the token's own position + 1: what decoding one
    by one gives, and the same however a prompt is cut into chunks or shared.
    """
    length = (positions + 1).clamp_min(rope.original_max_position).to(inv_freq.dtype)
    growth = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    theta = rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2))
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=inv_freq.dtype, device=inv_freq.device) / rope.rotary_dim
    return torch.where(growth.unsqueeze(1) > 1, 1.0 / theta.unsqueeze(1) ** exponents, inv_freq)


def attention_factor(rope: RopeFacts) -> float:
    """What cosines and sines are multiplied with: 1, or for yarn 0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4).

    `mscale` and `mscale_all_dim` together replace it by the quotient of 0.1 m ln(factor) + 1 for each m.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind != "yarn" or rope.factor <= 1:
        return 1.0
    gain = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * gain + 1) / (rope.mscale_all_dim * gain + 1)
    return gain + 1
