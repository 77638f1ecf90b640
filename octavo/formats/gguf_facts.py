"""Metadata and tensor index of a GGUF file become `ModelFacts`.

Every key under the architecture's name must be one of those read here, or hold the value under which it changes
nothing; any other is refused by name. Floats are stored in 32 bits and are read as the decimal that was meant.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from struct import pack, unpack, unpack_from
from typing import Any

import msgspec

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats.gguf import GGUFFile
from octavo.formats.jsonfile import merge_ids

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_READ = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Keys that change results, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("", "Meta AI original pth"),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (-1.0, 1.0),
}
_SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_WIDTH = {"F64": 3, "F32": 2, "BF16": 1, "F16": 0}
_DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_LAYERS = 4096
_FLOAT32_MAX = 3.4028234663852886e38
# Published llama3 scaling; files keep its result and not these numbers.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture

    def get(self, key: str) -> Any:
        return self.gguf.metadata.get(f"{self.architecture}.{key}")

    def wrong(self, key: str, value: object, remedy: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.gguf.path}: {self.architecture}.{key} is {value!r}, {remedy}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer. A list with one value per layer must hold the same value throughout."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.wrong(key, value, "not a positive integer that holds for every layer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "not a positive number")
        return decimal(float(value))


def decimal(value: float) -> float:
    """The shortest decimal that rounds to the same 32-bit float: 1e-05 for 9.999999747378752e-06."""
    if abs(value) > _FLOAT32_MAX or unpack("<f", pack("<f", value))[0] != value:
        return value
    return next(d for p in range(6, 10) if pack("<f", d := float(f"{value:.{p}g}")) == pack("<f", value))


def gguf_facts(path: Path) -> ModelFacts:
    """Facts of a whole (not split) GGUF file of a supported architecture."""
    gguf = GGUFFile(path)
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{path}: general.architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if gguf.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(f"{path}: split.count is {gguf.metadata['split.count']}: merge the parts into one file")
    keys = _Metadata(gguf, architecture)
    _refuse_unsupported(keys)
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise keys.wrong("attention.head_count_kv", kv_heads, f"of which {heads} heads are no multiple")
    hidden = keys.integer("embedding_length")
    layers = keys.integer("block_count")
    if layers > _MAX_LAYERS:
        raise keys.wrong("block_count", layers, f"more than {_MAX_LAYERS}")
    head_dim = _head_dim(keys, hidden, heads)
    rope = _rope(keys, head_dim)
    window = _window(keys)
    vocab_size = _vocab_size(gguf, hidden)
    return ModelFacts(
        path=str(path),
        files="gguf",
        architecture="mistral" if window is not None and architecture == "llama" else architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("feed_forward_length"),
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        tie_embeddings="output.weight" not in gguf.tensors,
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in gguf.tensors,
        output_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
        windows=(window,) * layers,
        dtype=_dtype(gguf),
        formats=_formats(gguf),
        eos_token_ids=merge_ids(vocab_size, *(_token_id(gguf, name) for name in ("eos", "eot", "eom"))),
        bos_token_id=next(iter(merge_ids(vocab_size, _token_id(gguf, "bos"))), None),
        sampling_defaults=_sampling_defaults(gguf),
        qk_norm=architecture == "qwen3",
    )


def _refuse_unsupported(keys: _Metadata) -> None:
    prefix = keys.architecture + "."
    for key in keys.gguf.metadata:
        name = key.removeprefix(prefix)
        if name == key or name in _READ:
            continue
        value = keys.gguf.metadata[key]
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise keys.wrong(name, value, "a key or value that is not supported")


def _head_dim(keys: _Metadata, hidden: int, heads: int) -> int:
    if keys.get("attention.key_length") is None and hidden % heads:
        raise keys.wrong(
            "embedding_length", hidden, f"no multiple of {heads} heads, and attention.key_length is not given"
        )
    head_dim = keys.integer("attention.key_length", hidden // heads)
    value_dim = keys.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise keys.wrong("attention.value_length", value_dim, f"other than the key length {head_dim}")
    return head_dim


def _vocab_size(gguf: GGUFFile, hidden: int) -> int:
    """Rows of the embedding, which padding can make more than the tokenizer's tokens."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        shape = embedding and embedding.shape
        raise ConfigError(
            f"{gguf.path}: token_embd.weight has shape {shape}, not [vocabulary, {hidden}]: no whole model"
        )
    return embedding.shape[0]


def _window(keys: _Metadata) -> int | None:
    """The window of every layer. Mistral's files call themselves llama; the others would need a list of layers."""
    value = keys.get("attention.sliding_window")
    if value in (None, 0):
        return None
    window = keys.integer("attention.sliding_window")
    if window >= keys.integer("context_length"):
        return None
    if keys.architecture != "llama":
        raise keys.wrong("attention.sliding_window", window, "without saying which layers have it")
    return window


def _rope(keys: _Metadata, head_dim: int) -> RopeFacts:
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim or (keys.architecture == "llama" and rotary_dim != head_dim):
        raise keys.wrong("rope.dimension_count", rotary_dim, f"which does not suit heads of {head_dim}")
    rope = RopeFacts(theta=keys.number("rope.freq_base", 10000.0), rotary_dim=rotary_dim)
    if rope.theta <= 1:
        raise keys.wrong("rope.freq_base", rope.theta, "not above 1")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.get("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise keys.wrong("rope.scaling.type", kind, "supported: none, linear, yarn")
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and attention_factor != 1.0:
        raise keys.wrong("rope.scaling.attn_factor", attention_factor, "which only yarn has")
    scaled = kind != "none" and factor != 1.0
    if "rope_freqs.weight" in keys.gguf.tensors:
        if scaled:
            raise keys.wrong(
                "rope.scaling.factor", factor, "beside the tensor rope_freqs.weight: only one is supported"
            )
        return _llama3(keys.gguf, rope)
    if not scaled:
        return rope
    if kind == "linear":
        return msgspec.structs.replace(rope, kind="linear", factor=factor)
    return msgspec.structs.replace(
        rope,
        kind="yarn",
        factor=factor,
        original_max_position=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if attention_factor == 1.0 else attention_factor * (0.1 * math.log(factor) + 1.0),
    )


def _llama3(gguf: GGUFFile, rope: RopeFacts) -> RopeFacts:
    """Llama 3's scaling, recovered from rope_freqs.weight and verified against it.

    The tensor [rotary_dim / 2] holds what each inverse frequency is divided by: 1 for wavelengths below
    original / high, the factor for those above original / low, and between them 1 / ((1 - s) / factor + s).
    """
    tensor = gguf.tensors["rope_freqs.weight"]
    half = rope.rotary_dim // 2
    if tensor.type != "F32" or tensor.shape != (half,):
        raise UnsupportedModel(
            f"{gguf.path}: rope_freqs.weight is {tensor.type} of shape {tensor.shape}, not F32 ({half},)"
        )
    stored = unpack_from(f"<{half}f", gguf.data(tensor))
    factor = max(stored)
    if 1.0 <= factor <= _FLOAT32_MAX:
        scaled: RopeFacts = msgspec.structs.replace(rope, kind="llama3", factor=decimal(factor), **_LLAMA3)
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(stored, _llama3_divisors(scaled), strict=True)):
            return scaled if factor > 1.0 else rope
    raise UnsupportedModel(f"{gguf.path}: rope_freqs.weight is not llama3 scaling, the only kind supported")


def _llama3_divisors(rope: RopeFacts) -> list[float]:
    divisors = []
    for i in range(rope.rotary_dim // 2):
        turns = rope.original_max_position * rope.theta ** (-2 * i / rope.rotary_dim) / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - smooth) / rope.factor + smooth))
    return divisors


def _formats(gguf: GGUFFile) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        counts[tensor.type] += math.prod(tensor.shape)
    return dict(counts)


def _dtype(gguf: GGUFFile) -> str:
    """The widest format among the matrices; norms count only where every matrix is quantized."""
    floats = [t for t in gguf.tensors.values() if t.type in _WIDTH]
    candidates = [t.type for t in floats if len(t.shape) > 1] or [t.type for t in floats] or ["F32"]
    return _DTYPES[max(candidates, key=lambda name: _WIDTH[name])]


def _token_id(gguf: GGUFFile, name: str) -> tuple[int, ...]:
    value = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return () if value is None or isinstance(value, bool) or not isinstance(value, int) else (value,)


def _sampling_defaults(gguf: GGUFFile) -> dict[str, float]:
    values = {name: gguf.metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return {n: decimal(v) if isinstance(v, float) else v for n, v in values.items() if v is not None}
