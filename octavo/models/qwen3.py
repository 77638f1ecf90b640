"""Qwen3 (arXiv:2505.09388): Llama with normalised query and key heads, and an optional window in some layers."""

from __future__ import annotations

from typing import ClassVar

from octavo.models.llama import Llama
from octavo.models.weight_map import Names


class Qwen3(Llama):
    optional = frozenset({"qkv_bias", "output_bias", "qk_norm"})
    windowed = True
    block_names: ClassVar[Names] = {
        **Llama.block_names,
        "self_attn.q_norm": ("attn.q_norm", ""),
        "self_attn.k_norm": ("attn.k_norm", ""),
    }
