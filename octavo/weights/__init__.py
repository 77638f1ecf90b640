"""Weights on disk become tensors of a model: safetensors, GGUF, or random numbers for trials.

Start with `load_weights`. Does not know families of models (`models`) or container formats (`formats`).
"""

from octavo.weights.load import load_weights

__all__ = ["load_weights"]
