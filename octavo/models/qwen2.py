"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k and v, and an optional window in some layers."""

from __future__ import annotations

from octavo.models.llama import Llama


class Qwen2(Llama):
    optional = frozenset({"qkv_bias"})
    windowed = True
