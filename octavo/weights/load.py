"""Streams the weights of a checkpoint into a model, one tensor at a time.

Whatever the file, the model sees Hugging Face names and layouts: GGUF names are translated, its quantized tensors
become floats, and the rows that llama.cpp reorders for rope go back to their places. Matrices are read from the file
when the model cuts its share out of them. Memory beyond the model's own stays near one tensor. Does not know where a
tensor goes: that is the model's `load_weight`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Literal, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.core.facts import ModelFacts
from octavo.formats.gguf import GGUFFile
from octavo.formats.safetensors import SafetensorsIndex
from octavo.quant import Stored
from octavo.quant.gguf_blocks import PACKED
from octavo.weights.gguf_names import hf_name
from octavo.weights.gguf_types import FileMatrix, check_type, dequantize

logger = logging.getLogger("octavo")

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Progress = Callable[[str, int, int], None]
"""(what is counted, done, total)."""

DUMMY_BOUND = 1e-3
_MAX_THREADS = 16
_FLOATS = ("F64", "F32", "F16", "BF16")


class Model(Protocol):
    """What loading needs of a model."""

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]: ...
    def load_weight(self, name: str, tensor: Stored) -> None: ...
    def finish_loading(self) -> None: ...
    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


def load_weights(
    model: Model,
    facts: ModelFacts,
    *,
    load_format: LoadFormat,
    seed: int,
    progress: Progress | None = None,
    keep: frozenset[str] = frozenset(),
) -> None:
    """Fills `model` from the files that `facts` names, or with random numbers for "dummy".

    `progress` is told after each tensor. GGUF matrices in the number formats `keep` come to the model as Blocks, others
    as floats. Raises ConfigError when the files are not of `load_format` or not there, and
    UnsupportedModel for number formats or names that the model does not know.
    """
    stream = _dummy(model, seed) if load_format == "dummy" else _files(facts, load_format, keep)
    for done, total, name, tensor in stream:
        model.load_weight(name, tensor)
        if progress is not None:
            progress("tensors", done, total)
    model.finish_loading()


Weights = Iterator[tuple[int, int, str, Stored]]
"""(number of this tensor, from 1, number of all, name, the tensor)."""


def _files(facts: ModelFacts, load_format: LoadFormat, keep: frozenset[str]) -> Weights:
    if facts.files == "none":
        raise ConfigError(
            f"{facts.path} holds no *.safetensors: download the weights, or use load_format dummy for random ones"
        )
    if load_format not in ("auto", facts.files):
        raise ConfigError(f"load_format is {load_format}, but {facts.path} holds {facts.files}: use auto")
    return _gguf(facts, keep) if facts.files == "gguf" else _safetensors(facts)


def _safetensors(facts: ModelFacts) -> Weights:
    """File by file; a tensor is a view of the file's mapping."""
    from safetensors import safe_open

    index = SafetensorsIndex(Path(facts.path))
    done, total = 0, len(index.tensors)
    for file, tensors in index.files.items():
        with safe_open(file, framework="pt") as opened:
            for tensor in tensors:
                if tensor.dtype not in _FLOATS:
                    raise UnsupportedModel(
                        f"{file}: weight {tensor.name} has dtype {tensor.dtype}; supported: {', '.join(_FLOATS)}"
                    )
                done += 1
                yield done, total, tensor.name, opened.get_tensor(tensor.name)


def _gguf(facts: ModelFacts, keep: frozenset[str]) -> Weights:
    """In the order of the file."""
    gguf = GGUFFile(facts.path)
    reordered = gguf.metadata["general.architecture"] == "llama"
    heads = {"q_proj": facts.num_heads, "k_proj": facts.num_kv_heads}
    tensors = sorted(gguf.tensors.values(), key=lambda tensor: tensor.offset)
    expanded: set[str] = set()
    with ThreadPoolExecutor(min(cpu_count() or 1, _MAX_THREADS), "dequantize") as pool:
        for done, entry in enumerate(tensors, 1):
            name = hf_name(entry.name)
            if name is None:
                continue
            kept = entry.type in keep and len(entry.shape) == 2
            if keep and not kept and entry.type in PACKED:
                expanded.add(entry.type)
            try:
                check_type(entry.type)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"{gguf.path}: tensor {entry.name}: {error}") from None
            module = name.split(".")[-2]
            count = heads[module] if reordered and module in heads else 0
            if len(entry.shape) == 2:
                rows = np.frombuffer(gguf.data(entry), np.uint8).reshape(entry.shape[0], -1)
                order = restore_rope_order(torch.arange(len(rows)), count).numpy() if count else None
                yield done, len(tensors), name, FileMatrix(rows, entry.type, kept, order, pool)
            else:
                vector = dequantize(gguf.data(entry), entry.type, entry.shape, pool)
                yield done, len(tensors), name, restore_rope_order(vector, count) if count else vector
    if expanded:
        logger.warning("no kernel multiplies %s: such weights are expanded to floats", ", ".join(sorted(expanded)))


def restore_rope_order(tensor: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's order of the rows of q and k: [heads * d, ...] -> the same shape.

    It interleaves the two halves of each head, which rotate against each other: row (i, half) goes to 2 i + half.
    """
    if tensor.shape[0] % (2 * heads):
        raise UnsupportedModel(
            f"a projection of {tensor.shape[0]} rows does not divide into {heads} heads of even size"
        )
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _dummy(model: Model, seed: int) -> Weights:
    """Uniform in +-1e-3, each tensor from the seed and its name: the same whatever the order and the ranks."""
    like = next(model.tensors())[1]
    slots = list(model.slots())
    for done, (name, shape) in enumerate(slots, 1):
        generator = torch.Generator(like.device).manual_seed(crc32(f"{seed} {name}".encode()))
        tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
        yield done, len(slots), name, tensor.uniform_(-DUMMY_BOUND, DUMMY_BOUND, generator=generator)
