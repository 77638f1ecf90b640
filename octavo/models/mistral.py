"""Mistral (arXiv:2310.06825): Llama without biases, with an optional sliding window."""

from __future__ import annotations

from octavo.models.llama import Llama


class Mistral(Llama):
    optional = frozenset()
    windowed = True
