"""config.json of a Hugging Face model directory becomes `ModelFacts`.

Reads the older spelling of rotary embeddings (`rope_theta`, `rope_scaling`) and the one of transformers 5
(`rope_parameters`). A key whose value would change results and is not implemented is refused by name; keys that
change nothing at inference are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats.jsonfile import merge_ids, read_json, token_ids
from octavo.formats.safetensors import SafetensorsIndex, weight_files


class Family(NamedTuple):
    """A supported architecture: our name for it, and what config.json means when it leaves a key out."""

    name: str
    defaults: Mapping[str, Any]


_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_QWEN: dict[str, Any] = {**_COMMON, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", {**_COMMON, "max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        "mistral",
        {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family("qwen2", {**_QWEN, "num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Family("qwen3", {**_QWEN, "num_key_value_heads": 32, "head_dim": 128}),
}
_MODEL_TYPES = {family.name: architecture for architecture, family in FAMILIES.items()}

# Keys that change results, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "quantization": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "rope_interleaved": (None, False),
    "use_rope": (None, True),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
    "dual_chunk_attention_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "use_qk_norm": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "kv_lora_rank": (None,),
    "llama_4_scaling": (None,),
}

_DTYPES = {"float64": "float32", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
_STORED = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_LAYERS = 4096
_MAX_NUMBER = 1e15


class _Config:
    """config.json over the family's defaults, with typed and checked access."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file, self.values = file, values

    def refuse(self, key: str, value: object, remedy: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.file}: {key} is {value!r}, which is not supported; {remedy}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"{self.file}: {key} is {value!r}, not a positive integer: correct it")
        return value

    def number(self, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_NUMBER:
            raise ConfigError(f"{self.file}: {key} is {value!r}, not a positive number: correct it")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise ConfigError(f"{self.file}: {key} is {value!r}, neither true nor false: correct it")
        return bool(value)


def hf_facts(directory: Path) -> ModelFacts:
    """Facts from config.json, the tokenizer's EOS and the headers of the weights; not from generation_config.json."""
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"{directory} holds no config.json: it is no model directory")
    raw = read_json(file)
    family = _family(file, raw)
    config = _Config(file, {**family.defaults, **raw})
    _refuse_unsupported(config)
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    hidden = config.integer("hidden_size")
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", kv_heads, f"{heads} attention heads must be a multiple of it")
    if hidden % heads and config.values.get("head_dim") is None:
        raise config.refuse("hidden_size", hidden, f"it is no multiple of {heads} heads, and head_dim is not given")
    head_dim = config.integer("head_dim", hidden // heads)
    rope = _rope(config, head_dim)
    vocab_size = config.integer("vocab_size")
    attention_bias = config.flag("attention_bias") and family.name in ("llama", "qwen3")
    has_weights = bool(weight_files(directory))
    return ModelFacts(
        path=str(directory),
        files="safetensors" if has_weights else "none",
        architecture=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=_num_layers(config),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        max_position=_max_position(config, rope),
        norm_eps=config.number(config.values, "rms_norm_eps"),
        rope=rope,
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or family.name == "qwen2",
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias") and family.name == "llama",
        windows=_windows(config, family.name),
        dtype=_dtype(config, directory if has_weights else None),
        eos_token_ids=merge_ids(vocab_size, token_ids(raw, "eos_token_id", file), _tokenizer_eos(directory)),
        bos_token_id=next(iter(merge_ids(vocab_size, token_ids(raw, "bos_token_id", file))), None),
        qk_norm=family.name == "qwen3",
    )


def _family(file: Path, config: dict[str, Any]) -> Family:
    names = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")), config.get("model_type"))]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(f"{file}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse_unsupported(config: _Config) -> None:
    for key, neutral in _NEUTRAL.items():
        value = config.values.get(key)
        if value not in neutral:
            allowed = ", ".join("absent" if v is None else repr(v) for v in neutral)
            shown = value.get("quant_method", value) if isinstance(value, dict) else value
            raise config.refuse(key, shown, f"supported: {allowed}")


def _num_layers(config: _Config) -> int:
    layers = config.integer("num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise config.refuse("num_hidden_layers", layers, f"at most {_MAX_LAYERS}")
    return layers


# Rotary embedding ------------------------------------------------------------------------------------------------

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor",
    "partial_rotary_factor", "finetuned",
}  # fmt: skip
_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def _rope(config: _Config, head_dim: int) -> RopeFacts:
    """Keys given inside the rope table win over those beside it, as in transformers."""
    values = config.values
    table = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise config.refuse("rope_parameters", table, "one table for all layers is supported")
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise config.refuse("rope type", kind, f"supported: {', '.join(_ROPE_KINDS)}")
    unknown = set(table) - _ROPE_KEYS
    if unknown:
        raise config.refuse("rope key", sorted(unknown)[0], f"supported: {', '.join(sorted(_ROPE_KEYS))}")
    theta = config.number(table, "rope_theta", config.number(values, "rope_theta", 10000.0))
    partial = config.number(table, "partial_rotary_factor", config.number(values, "partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.refuse("rotary dimension", rotary_dim, f"it must be even and at most the head's {head_dim}")
    if theta <= 1:
        raise config.refuse("rope_theta", theta, "it must be above 1")
    rope = RopeFacts(theta=theta, rotary_dim=rotary_dim)
    return rope if kind == "default" else _scaled(config, table, kind, rope)


def _scaled(config: _Config, table: dict[str, Any], kind: str, rope: RopeFacts) -> RopeFacts:
    """`rope` with the scaling of `table`; sets no more than what the kind uses."""
    longest = config.integer("max_position_embeddings")
    changes: dict[str, Any] = {"kind": cast(Literal["linear", "dynamic", "yarn", "llama3"], kind)}
    if kind == "dynamic":
        if rope.rotary_dim == 2:
            raise config.refuse("rotary dimension", 2, "dynamic scaling needs more")
        changes["original_max_position"] = longest
    elif kind in ("yarn", "llama3"):
        beside = config.values.get("original_max_position_embeddings")
        source = table if beside is None else config.values
        changes["original_max_position"] = int(config.number(source, "original_max_position_embeddings", longest))
    if kind == "llama3":
        changes["low_freq_factor"] = config.number(table, "low_freq_factor")
        changes["high_freq_factor"] = config.number(table, "high_freq_factor")
        if changes["low_freq_factor"] >= changes["high_freq_factor"]:
            raise config.refuse("low_freq_factor", changes["low_freq_factor"], "it must be below high_freq_factor")
    fallback = None
    if kind == "yarn":
        fallback = longest / changes["original_max_position"]
        changes["beta_fast"] = config.number(table, "beta_fast", 32.0)
        changes["beta_slow"] = config.number(table, "beta_slow", 1.0)
        changes["truncate"] = table.get("truncate") is not False
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if table.get(key):
                changes[key] = config.number(table, key)
    changes["factor"] = config.number(table, "factor", fallback)
    return msgspec.structs.replace(rope, **changes)


def _max_position(config: _Config, rope: RopeFacts) -> int:
    """The context that the scaling was made for: max_position_embeddings states it for llama3, else the factor does."""
    longest = config.integer("max_position_embeddings")
    stretched = float(longest)
    if rope.kind == "yarn":
        stretched = rope.original_max_position * rope.factor
    elif rope.kind in ("linear", "dynamic"):
        stretched = longest * rope.factor
    if not 1 <= stretched < 2**31:
        raise config.refuse("rope factor", rope.factor, f"it makes a context of {stretched} tokens")
    return int(stretched)


# Attention windows -----------------------------------------------------------------------------------------------


def _windows(config: _Config, family: str) -> tuple[int | None, ...]:
    """Per layer; a window of w means that token i attends to j with i - w < j <= i."""
    layers = _num_layers(config)
    uses = family == "mistral" or (family in ("qwen2", "qwen3") and config.flag("use_sliding_window"))
    window = config.integer("sliding_window") if uses and config.values.get("sliding_window") is not None else None
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = config.values.get("max_window_layers") if family.startswith("qwen") else 0
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"{config.file}: max_window_layers is {first!r}, not an integer: correct it")
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"{config.file}: layer_types does not have one entry for each of {layers} layers: correct it")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
            raise config.refuse("layer_types", kind, "full_attention, and with a sliding_window sliding_attention, are")
    if family == "mistral" and window is not None and "full_attention" in kinds:
        raise config.refuse("layer_types", "full_attention", "Mistral's sliding_window holds for all of its layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# Number format and tokens ----------------------------------------------------------------------------------------


def _dtype(config: _Config, weights: Path | None) -> str:
    """What config.json says, else the format of the largest tensor, else bfloat16."""
    stated = config.values.get("dtype") or config.values.get("torch_dtype")
    if stated is not None:
        name = str(stated).removeprefix("torch.")
        if name not in _DTYPES:
            raise config.refuse("dtype", stated, f"supported: {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if weights is None:
        return "bfloat16"
    largest = max(SafetensorsIndex(weights).tensors.values(), key=lambda t: t.nbytes, default=None)
    if largest is None or largest.dtype not in _STORED:
        raise config.refuse("dtype", largest and largest.dtype, f"weights must be one of {', '.join(_STORED)}")
    return _STORED[largest.dtype]


class _Token(msgspec.Struct):
    content: str
    id: int = -1


class _Vocab(msgspec.Struct):
    vocab: Any = None


class _TokenizerJson(msgspec.Struct):
    added_tokens: list[_Token] = []
    model: _Vocab = msgspec.field(default_factory=_Vocab)


def _tokenizer_eos(directory: Path) -> tuple[int, ...]:
    """The id of tokenizer_config.json's eos_token; empty when there is none."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return ()
    config = read_json(file)
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return ()
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict):
        for key, entry in added.items():
            if isinstance(entry, dict) and entry.get("content") == text and key.isdecimal():
                return (int(key),)
    return _id_in_tokenizer_json(directory / "tokenizer.json", text)


def _id_in_tokenizer_json(file: Path, text: str) -> tuple[int, ...]:
    if not file.is_file():
        return ()
    try:
        tokenizer = msgspec.json.decode(file.read_bytes(), type=_TokenizerJson)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is no tokenizer ({error}): download it again") from error
    for token in tokenizer.added_tokens:
        if token.content == text:
            return (token.id,)
    vocab = tokenizer.model.vocab
    found = vocab.get(text) if isinstance(vocab, dict) else None
    return (found,) if isinstance(found, int) else ()
