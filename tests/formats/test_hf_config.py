from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import save_file

from octavo.core.errors import ConfigError, OctavoError, UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats import read_facts

Maker = Callable[..., Path]
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]


def raw(family: str = "Llama", **values: Any) -> dict[str, Any]:
    """A config.json written by hand: what is not in it takes the family's defaults."""
    return {"architectures": [f"{family}ForCausalLM"], **SHAPE, **values}


def written(directory: Path, family: str, **values: Any) -> Any:
    """Saves transformers' own config of the family; returns it."""
    kind = getattr(transformers, f"{family}Config")
    config = kind(**{**SHAPE, **values}, architectures=[f"{family}ForCausalLM"])
    config.save_pretrained(directory)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_as_transformers_writes_it(family: str, tmp_path: Path) -> None:
    config = written(tmp_path, family, rms_norm_eps=1e-5, tie_word_embeddings=True, eos_token_id=[3, 5], bos_token_id=7)
    facts = read_facts(tmp_path)
    assert facts.architecture == family.lower()
    assert facts.files == "none"
    assert (facts.vocab_size, facts.hidden_size, facts.intermediate_size, facts.num_layers) == (128, 64, 96, 4)
    assert (facts.num_heads, facts.num_kv_heads) == (4, 2)
    assert facts.head_dim == getattr(config, "head_dim", 16)
    assert facts.max_position == config.max_position_embeddings
    assert facts.norm_eps == 1e-5
    assert facts.tie_embeddings
    assert facts.eos_token_ids == (3, 5)
    assert facts.bos_token_id == 7
    assert facts.rope == RopeFacts(theta=10000.0, rotary_dim=facts.head_dim)
    assert facts.windows == ((4096 if family == "Mistral" else None),) * 4
    assert facts.qk_norm == (family == "Qwen3")
    assert facts.qkv_bias == (family == "Qwen2")
    assert not facts.output_bias
    assert not facts.mlp_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_count_the_parameters_that_transformers_builds(family: str, tmp_path: Path) -> None:
    biases = {"Llama": {"attention_bias": True, "mlp_bias": True}, "Qwen3": {"attention_bias": True}}
    config = written(tmp_path, family, **biases.get(family, {}))
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert read_facts(tmp_path).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_keys_left_out(family: str, make_directory: Maker) -> None:
    values = raw(family)
    del values["num_key_value_heads"]
    config = getattr(transformers, f"{family}Config")(**values)
    facts = read_facts(make_directory(values)) if 4 % config.num_key_value_heads == 0 else None
    if facts is None:  # the family's default does not suit 4 heads, and is named
        with pytest.raises(UnsupportedModel, match=f"num_key_value_heads is {config.num_key_value_heads}"):
            read_facts(make_directory(values))
        facts = read_facts(make_directory(values | {"num_key_value_heads": 4}))
    assert facts.max_position == config.max_position_embeddings
    assert facts.norm_eps == config.rms_norm_eps
    assert facts.head_dim == getattr(config, "head_dim", 16)
    assert facts.tie_embeddings == config.tie_word_embeddings
    assert facts.windows == (getattr(config, "sliding_window", None),) * 4


SCALINGS: dict[str, tuple[dict[str, Any], RopeFacts, int]] = {
    "linear": ({"factor": 4.0}, RopeFacts(kind="linear", factor=4.0), 8192),
    "dynamic": ({"factor": 2.0}, RopeFacts(kind="dynamic", factor=2.0, original_max_position=2048), 4096),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        RopeFacts(kind="llama3", factor=8.0, original_max_position=1024),
        2048,
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "mscale": 0.7, "truncate": False},
        RopeFacts(kind="yarn", factor=4.0, original_max_position=1024, beta_fast=16, mscale=0.7, truncate=False),
        4096,
    ),
}


@pytest.mark.parametrize("style", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scaling(kind: str, style: str, make_directory: Maker) -> None:
    table, expected, context = SCALINGS[kind]
    if style == "rope_parameters":
        values: dict[str, Any] = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **table}}
    else:
        values = {"rope_theta": 5e5, "rope_scaling": {style: kind, **table}}
    facts = read_facts(make_directory(raw(max_position_embeddings=2048, **values)))
    assert facts.rope == msgspec.structs.replace(expected, theta=5e5, rotary_dim=16)
    assert facts.max_position == context


def test_rope_as_transformers_converts_the_older_spelling(tmp_path: Path, make_directory: Maker) -> None:
    older: dict[str, Any] = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    written(tmp_path, "Llama", **older)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    rope = read_facts(tmp_path).rope
    assert rope == read_facts(make_directory(raw(**older))).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 1e6, 2.0)


def test_yarn_without_its_original_length_or_factor(make_directory: Maker) -> None:
    table: dict[str, Any] = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    rope = read_facts(make_directory(raw(max_position_embeddings=2048, rope_scaling=table))).rope
    assert (rope.factor, rope.original_max_position) == (4.0, 512)
    table = {"rope_type": "yarn", "factor": 4.0}
    facts = read_facts(make_directory(raw(max_position_embeddings=2048, rope_scaling=table)))
    assert (facts.rope.original_max_position, facts.max_position) == (2048, 8192)


def test_original_length_beside_the_table_wins(make_directory: Maker) -> None:
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    values = raw(rope_scaling=table, original_max_position_embeddings=256)
    assert read_facts(make_directory(values)).rope.original_max_position == 256


@pytest.mark.parametrize("inside", [True, False])
def test_partial_rotation(inside: bool, make_directory: Maker) -> None:
    partial = {"partial_rotary_factor": 0.5}
    values = {"rope_parameters": {"rope_type": "default", **partial}} if inside else partial
    assert read_facts(make_directory(raw(**values))).rope.rotary_dim == 8


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_windows_of_qwen(family: str, tmp_path: Path, make_directory: Maker) -> None:
    values = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    config = written(tmp_path, family, **values)
    expected = tuple(16 if kind == "sliding_attention" else None for kind in config.layer_types)
    assert expected == (None, None, None, 16)
    assert read_facts(tmp_path).windows == expected
    assert read_facts(make_directory(raw(family, **values))).windows == expected
    mixed = ["sliding_attention", "full_attention"] * 2
    assert read_facts(make_directory(raw(family, **values, layer_types=mixed))).windows == (16, None, 16, None)
    off = values | {"use_sliding_window": False}
    assert read_facts(make_directory(raw(family, **off))).windows == (None,) * 4


def test_windows_of_mistral(make_directory: Maker) -> None:
    assert read_facts(make_directory(raw("Mistral", sliding_window=8))).windows == (8,) * 4
    assert read_facts(make_directory(raw("Mistral", sliding_window=None))).windows == (None,) * 4
    assert read_facts(make_directory(raw("Llama", sliding_window=8))).windows == (None,) * 4


def test_biases(make_directory: Maker) -> None:
    facts = read_facts(make_directory(raw(attention_bias=True, mlp_bias=True)))
    assert (facts.qkv_bias, facts.output_bias, facts.mlp_bias) == (True, True, True)
    facts = read_facts(make_directory(raw("Qwen3", attention_bias=True)))
    assert (facts.qkv_bias, facts.output_bias) == (True, True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    ({"architectures": None, "model_type": "phi"}, "phi"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is 'awq'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "alpha": 3}}, "alpha"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one table for all layers"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}}, "below"),
    ({"partial_rotary_factor": 0.2}, "rotary dimension is 3"),
    ({"partial_rotary_factor": 1.5}, "rotary dimension is 24"),
    ({"rope_theta": 1}, "rope_theta is 1"),
    ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary dimension is 2"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"hidden_size": 66}, "hidden_size is 66"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types is 'sliding_attention'"),
    ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"num_experts": 8}, "num_experts is 8"),
]


@pytest.mark.parametrize(("values", "fault"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_changes_results_is_refused_by_name(values: dict[str, Any], fault: str, make_directory: Maker) -> None:
    read_facts(make_directory(raw()))
    with pytest.raises(UnsupportedModel, match=fault) as caught:
        read_facts(make_directory(raw(**values)))
    assert "config.json" in str(caught.value)


def test_mistral_refuses_a_mix_that_transformers_ignores(make_directory: Maker) -> None:
    mixed = ["sliding_attention", "full_attention"] * 2
    with pytest.raises(UnsupportedModel, match="full_attention"):
        read_facts(make_directory(raw("Mistral", sliding_window=8, layer_types=mixed)))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": "big"}}, "attention_factor is 'big'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": None}, "max_window_layers is None"),
        ({"layer_types": ["full_attention"]}, "layer_types does not have"),
        ({"sliding_window": 0, "architectures": ["MistralForCausalLM"]}, "sliding_window is 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_values_are_named(values: dict[str, Any], fault: str, make_directory: Maker) -> None:
    with pytest.raises(ConfigError, match=fault):
        read_facts(make_directory(raw(**values)))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000])
def test_broken_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_facts(tmp_path)


JUNK: list[Any] = [None, True, -1, 0, 1, 2**70, 1e300, math.inf, math.nan, "x", "", [], [[]], ["x"], {}, {"a": []}]


@pytest.mark.parametrize("kind", [None, *SCALINGS])
def test_no_junk_value_crashes(kind: str | None, make_directory: Maker) -> None:
    table = {"rope_type": kind, **SCALINGS[kind][0]} if kind else {"rope_type": "default", "rope_theta": 1e4}
    whole = raw("Qwen3", layer_types=["full_attention"] * 4, use_sliding_window=True, sliding_window=8,
                max_position_embeddings=2048, head_dim=16, rope_parameters=table, eos_token_id=2, bos_token_id=1,
                rms_norm_eps=1e-6, dtype="float32", attention_bias=False, model_type="qwen3")  # fmt: skip
    read = 0
    changes = [{key: junk} for key in whole for junk in JUNK]
    changes += [{"rope_parameters": {**table, key: junk}} for key in (*table, "attention_factor") for junk in JUNK]
    for change in changes:
        with suppress(OctavoError):
            facts = read_facts(make_directory({**whole, **change}))
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=ModelFacts) == facts
            read += 1
    assert 0 < read < len(changes)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_facts(tmp_path)
    with pytest.raises(ConfigError, match="neither a directory nor a file"):
        read_facts(tmp_path / "absent")


def test_architecture_from_model_type(make_directory: Maker) -> None:
    assert read_facts(make_directory(raw("Qwen3") | {"architectures": None, "model_type": "qwen3"})).qk_norm


@pytest.mark.parametrize(("key", "value"), [("dtype", "float16"), ("torch_dtype", "float16")])
def test_stated_dtype(key: str, value: str, make_directory: Maker) -> None:
    assert read_facts(make_directory(raw(**{key: value}))).dtype == "float16"


def test_dtype_of_the_weights_when_none_is_stated(make_directory: Maker) -> None:
    directory = make_directory(raw(torch_dtype=None))
    assert read_facts(directory).dtype == "bfloat16"
    save_file({"big": torch.zeros(9, dtype=torch.float16), "norm": torch.zeros(2)}, directory / "model.safetensors")
    facts = read_facts(directory)
    assert (facts.dtype, facts.files) == ("float16", "safetensors")


def added(content: str, id_: int) -> dict[str, Any]:
    return {"id": id_, "content": content, "special": True, "lstrip": False}


def test_eos_is_the_union_of_all_sources(make_directory: Maker) -> None:
    directory = make_directory(
        raw(eos_token_id=2),
        generation_config_json={"eos_token_id": [2, 4, 500]},
        tokenizer_config_json={"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"6": {"content": "</s>"}}},
    )
    assert read_facts(directory).eos_token_ids == (2, 6, 4)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"added_tokens": [added("<s>", 1), added("<end>", 9)], "model": {"vocab": {"<end>": 3}}},
        {"added_tokens": [], "model": {"type": "BPE", "vocab": {"<end>": 9}, "merges": []}},
    ],
)
def test_eos_from_tokenizer_json(tokenizer: dict[str, Any], make_directory: Maker) -> None:
    directory = make_directory(raw(), tokenizer_config_json={"eos_token": "<end>"}, tokenizer_json=tokenizer)
    assert read_facts(directory).eos_token_ids == (9,)


def test_eos_that_no_tokenizer_knows(make_directory: Maker) -> None:
    assert read_facts(make_directory(raw(), tokenizer_config_json={"eos_token": "<end>"})).eos_token_ids == ()
    unigram = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0]]}}
    directory = make_directory(raw(), tokenizer_config_json={"eos_token": "<end>"}, tokenizer_json=unigram)
    assert read_facts(directory).eos_token_ids == ()


def test_sampling_defaults(make_directory: Maker, tmp_path: Path) -> None:
    given = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "do_sample": True,
        "max_new_tokens": 100,
        "eos_token_id": 9,
    }
    directory = make_directory(raw(eos_token_id=2), generation_config_json=given)
    facts = read_facts(directory)
    assert facts.sampling_defaults == {"temperature": 0.6, "top_k": 20, "max_new_tokens": 100}
    assert facts.eos_token_ids == (2, 9)
    without = read_facts(directory, "vllm")
    assert without == msgspec.structs.replace(facts, sampling_defaults={})
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"min_p": 0.1, "eos_token_id": 3}))
    elsewhere = read_facts(directory, str(other))
    assert elsewhere.sampling_defaults == {"min_p": 0.1}
    assert elsewhere.eos_token_ids == (2, 3)


def test_bad_generation_config(make_directory: Maker, tmp_path: Path) -> None:
    for name, value in {"temperature": "hot", "top_p": 2, "top_k": 1.5, "min_p": math.nan}.items():
        directory = make_directory(raw(), generation_config_json={name: value})
        with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} "):
            read_facts(directory)
        assert read_facts(directory, "vllm").sampling_defaults == {}
    with pytest.raises(ConfigError, match="neither auto, nor vllm, nor a folder"):
        read_facts(directory, str(tmp_path / "nowhere"))


def test_facts_travel_as_msgpack(make_directory: Maker) -> None:
    facts = read_facts(make_directory(raw("Mistral")))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=ModelFacts) == facts
