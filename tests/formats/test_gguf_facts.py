from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.core.errors import ConfigError, OctavoError, UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats import locate, read_facts
from octavo.formats.gguf_facts import decimal

Maker = Callable[..., Path]
KEYS: dict[str, Any] = {
    "context_length": 2048,
    "embedding_length": 64,
    "block_count": 3,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
}
EMBEDDING = {"token_embd.weight": (1, (32, 64), bytes(32 * 64 * 2))}


def f32(*shape: int) -> tuple[int, tuple[int, ...], bytes]:
    return 0, shape, bytes(4 * math.prod(shape))


@pytest.fixture
def make(make_gguf: Maker) -> Maker:
    def build(
        architecture: str = "llama",
        changes: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        **other: Any,
    ) -> Path:
        keys = {
            f"{architecture}.{key}": value for key, value in {**KEYS, **(changes or {})}.items() if value is not None
        }
        tokens = {key.replace("__", "."): value for key, value in other.items()}
        return make_gguf({"general.architecture": architecture, **keys, **tokens}, {**EMBEDDING, **(tensors or {})})

    return build


def test_the_embedded_model() -> None:
    facts = read_facts(locate(None))
    assert (facts.architecture, facts.files, facts.vocab_size, facts.hidden_size) == ("llama", "gguf", 49152, 576)
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (30, 9, 3, 64)
    assert (facts.intermediate_size, facts.max_position, facts.norm_eps) == (1536, 8192, 1e-5)
    assert facts.rope == RopeFacts(theta=100000.0, rotary_dim=64)
    assert facts.tie_embeddings
    assert (facts.eos_token_ids, facts.bos_token_id) == ((2,), 1)
    assert facts.windows == (None,) * 30
    assert facts.num_parameters == 134_515_008


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_each_architecture(architecture: str, make: Maker) -> None:
    facts = read_facts(make(architecture, {"attention.key_length": 32, "attention.value_length": 32}))
    assert facts.architecture == architecture
    assert (facts.head_dim, facts.num_kv_heads, facts.vocab_size) == (32, 2, 32)
    assert (facts.norm_eps, facts.rope.theta, facts.rope.rotary_dim) == (1e-5, 500000.0, 32)
    assert facts.qkv_bias == (architecture == "qwen2")
    assert facts.qk_norm == (architecture == "qwen3")
    assert facts.dtype == "float16"
    assert facts.tie_embeddings


def test_what_the_tensors_say(make: Maker) -> None:
    tensors = {"output.weight": f32(32, 64), "blk.0.attn_q.bias": f32(64), "blk.0.ffn_up.bias": f32(96)}
    facts = read_facts(make(tensors=tensors))
    assert (facts.tie_embeddings, facts.qkv_bias, facts.mlp_bias, facts.output_bias) == (False, True, True, False)
    assert facts.dtype == "float32"
    assert read_facts(make(tensors={"blk.0.attn_output.bias": f32(64)})).output_bias


def test_dtype_when_every_matrix_is_quantized(make: Maker) -> None:
    quantized = {"token_embd.weight": (8, (32, 64), bytes(64 * 34)), "output_norm.weight": f32(64)}
    assert read_facts(make(tensors=quantized)).dtype == "float32"


def test_a_value_for_each_layer(make: Maker) -> None:
    facts = read_facts(make(changes={"attention.head_count_kv": [2, 2, 2], "feed_forward_length": [96] * 3}))
    assert (facts.num_kv_heads, facts.intermediate_size) == (2, 96)
    with pytest.raises(UnsupportedModel, match=r"head_count_kv is \[2, 4, 2\]"):
        read_facts(make(changes={"attention.head_count_kv": [2, 4, 2]}))


def test_window_of_mistral_files(make: Maker) -> None:
    facts = read_facts(make(changes={"attention.sliding_window": 16}))
    assert (facts.architecture, facts.windows) == ("mistral", (16, 16, 16))
    assert read_facts(make(changes={"attention.sliding_window": 2048})).windows == (None,) * 3
    with pytest.raises(UnsupportedModel, match="sliding_window is 16"):
        read_facts(make("qwen2", {"attention.sliding_window": 16}))


def test_token_ids_and_sampling_defaults(make: Maker) -> None:
    path = make(
        tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__eot_token_id=5,
        tokenizer__ggml__eom_token_id=2,
        tokenizer__ggml__bos_token_id=1,
        general__sampling__temp=0.7,
        general__sampling__top_k=20,
    )
    facts = read_facts(path)
    assert (facts.eos_token_ids, facts.bos_token_id) == ((2, 5), 1)
    assert facts.sampling_defaults == {"temperature": 0.7, "top_k": 20}
    assert read_facts(path, "vllm").sampling_defaults == {}
    with pytest.raises(ConfigError, match=r"model\.gguf: min_p is 2\.0"):
        read_facts(make(general__sampling__min_p=2.0))


def test_linear_scaling(make: Maker) -> None:
    expected = RopeFacts(theta=500000.0, rotary_dim=16, kind="linear", factor=4.0)
    assert read_facts(make(changes={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})).rope == expected
    assert read_facts(make(changes={"rope.scale_linear": 4.0})).rope == expected
    assert read_facts(make(changes={"rope.scaling.type": "none", "rope.scaling.factor": 4.0})).rope.kind == "default"


def test_yarn(make: Maker) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}
    rope = read_facts(make(changes=keys)).rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.attention_factor) == ("yarn", 4.0, 512, None)
    rope = read_facts(make(changes={**keys, "rope.scaling.attn_factor": 0.5})).rope
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


def divisors(factor: float, original: int, *, theta: float = 500000.0, dim: int = 128) -> tuple[Any, ...]:
    """rope_freqs.weight as llama.cpp's converter computes it for llama3 scaling (low 1, high 4)."""
    values = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < original / 4:
            values.append(1.0)
        elif wavelength > original:
            values.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            values.append(1 / ((1 - smooth) / factor + smooth))
    return 0, (dim // 2,), struct.pack(f"<{dim // 2}f", *values)


LONG = {"attention.key_length": 128, "attention.value_length": 128}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_tensor(factor: float, make: Maker) -> None:
    rope = read_facts(make(changes=LONG, tensors={"rope_freqs.weight": divisors(factor, 8192)})).rope
    assert rope == RopeFacts(
        theta=500000.0, rotary_dim=128, kind="llama3", factor=factor, original_max_position=8192, low_freq_factor=1.0
    )


def test_a_tensor_of_ones_is_no_scaling(make: Maker) -> None:
    ones = (0, (64,), struct.pack("<64f", *[1.0] * 64))
    assert read_facts(make(changes=LONG, tensors={"rope_freqs.weight": ones})).rope.kind == "default"


NAN = (0, (64,), struct.pack("<64f", *[math.nan] * 64))


@pytest.mark.parametrize("tensor", [divisors(8.0, 4096), f32(64), f32(32), NAN], ids=["length", "zero", "shape", "nan"])
def test_other_frequency_factors_are_refused(tensor: Any, make: Maker) -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        read_facts(make(changes=LONG, tensors={"rope_freqs.weight": tensor}))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"expert_count": 8}, "expert_count is 8"),
        ({"some_new_key": 1}, "some_new_key is 1"),
        ({"logit_scale": 2.0}, "logit_scale is 2"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "longrope"),
        ({"rope.dimension_count": 8}, "dimension_count is 8"),
        ({"attention.value_length": 8}, "value_length is 8"),
        ({"attention.head_count_kv": 3}, "head_count_kv is 3"),
        ({"embedding_length": 66}, "embedding_length is 66"),
        ({"block_count": 2**31 - 1}, "block_count is 2147483647"),
        ({"context_length": None}, "context_length is None"),
        ({"context_length": "long"}, "context_length is 'long'"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0"),
        ({"rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"rope.freq_base": 1.0}, "freq_base is 1.0"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_changes_results_is_refused_by_name(changes: dict[str, Any], fault: str, make: Maker) -> None:
    with pytest.raises(UnsupportedModel, match=fault) as caught:
        read_facts(make(changes=changes))
    assert "model.gguf" in str(caught.value)


JUNK: list[Any] = [
    True,
    0,
    1,
    ("i32", -1),
    ("u64", 2**64 - 1),
    ("f64", 1e300),
    math.inf,
    math.nan,
    "",
    "x",
    [],
    ["x"],
    [1, 2],
]


def test_no_junk_value_crashes(make: Maker) -> None:
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "attention.sliding_window": 16}
    keys = [*KEYS, *scaling, "attention.key_length", "rope.dimension_count", "rope.scaling.attn_factor", "expert_count"]
    read = 0
    for key in keys:
        for junk in JUNK:
            with suppress(OctavoError):
                facts = read_facts(make(changes={**scaling, key: junk}))
                assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=ModelFacts) == facts
                read += 1
    for name in ("general__architecture", "split__count", "tokenizer__ggml__eos_token_id", "general__sampling__temp"):
        for junk in JUNK:
            with suppress(OctavoError):
                read_facts(make(**{name: junk}))
                read += 1
    assert 0 < read < (len(keys) + 4) * len(JUNK)


def test_neutral_values_pass(make: Maker) -> None:
    assert read_facts(make(changes={"expert_count": 0, "logit_scale": 1.0, "attention.causal": True})).num_layers == 3


def test_architecture_and_parts(make: Maker) -> None:
    with pytest.raises(UnsupportedModel, match="'gemma'"):
        read_facts(make("gemma"))
    with pytest.raises(UnsupportedModel, match=r"split\.count is 3"):
        read_facts(make(split__count=3))


def test_partial_rotation_where_rows_are_not_reordered(make: Maker) -> None:
    assert read_facts(make("qwen2", {"rope.dimension_count": 8})).rope.rotary_dim == 8


def test_no_embedding(make_gguf: Maker) -> None:
    keys = {f"llama.{key}": value for key, value in KEYS.items()}
    with pytest.raises(ConfigError, match=r"token_embd\.weight has shape None"):
        read_facts(make_gguf({"general.architecture": "llama", **keys}, {}))


@pytest.mark.parametrize("value", [1e-5, 0.1, 10000.0, 1e6, 0.7, 3.4e38, 1.1754944e-38])
def test_decimal_restores_what_was_meant(value: float) -> None:
    assert decimal(struct.unpack("<f", struct.pack("<f", value))[0]) == value
    assert decimal(1e300) == 1e300
    assert decimal(1 / 3) == 1 / 3
