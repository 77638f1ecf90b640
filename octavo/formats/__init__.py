"""What lies on disk: where a model is, what its files contain, and the facts that shape the engine. Torch-free.

Start with `locate` (a name becomes a path) and `read_facts` (a path becomes ModelFacts). `GGUFFile` and
`SafetensorsIndex` are the containers; `octavo.weights` reads the numbers, `octavo.text` the tokenizer.
"""

from octavo.formats.facts import read_facts
from octavo.formats.gguf import GGUFFile, GGUFTensor
from octavo.formats.locate import BUILTIN_MODELS, DEFAULT_MODEL, locate
from octavo.formats.safetensors import SafetensorsIndex, SafetensorsTensor

__all__ = [
    "BUILTIN_MODELS",
    "DEFAULT_MODEL",
    "GGUFFile",
    "GGUFTensor",
    "SafetensorsIndex",
    "SafetensorsTensor",
    "locate",
    "read_facts",
]
