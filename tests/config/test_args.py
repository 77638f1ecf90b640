"""Argument structs: types, bounds and the rules between fields."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from octavo.config.args import EngineArgs, ServerArgs, settings_of
from octavo.core.errors import ConfigError

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int8"}, "--dtype is 'int8': choose one of auto, bfloat16"),
    ({"max_num_seqs": 0}, "--max-num-seqs is 0: expected int >= 1"),
    ({"max_model_len": "8k"}, "--max-model-len is '8k'"),
    ({"max_num_batched_tokens": -5}, "--max-num-batched-tokens is -5"),
    ({"seed": True}, "--seed is True"),
    ({"seed": -1}, "--seed is -1"),
    ({"overlap": 2}, "--overlap is 2: choose one of 0, 1"),
    ({"device": "tpu"}, "--device is 'tpu': choose auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:0x"}, "--device is 'cuda:0x'"),
    ({"block_size": 12}, "--block-size is 12: choose a power of two"),
    ({"block_size": 512}, "--block-size is 512"),
    ({"gpu_memory_utilization": 0}, "--gpu-memory-utilization is 0"),
    ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization is 1.5"),
    ({"load_format": "pt"}, "--load-format is 'pt': choose one of auto, safetensors, gguf, dummy"),
    ({"enable_prefix_caching": "yes"}, "--enable-prefix-caching is 'yes'"),
    ({"tensor_parallel_size": 0}, "--tensor-parallel-size is 0: expected int >= 1"),
    ({"pipeline_parallel_size": -1}, "--pipeline-parallel-size is -1: expected int >= 1"),
    ({"kv_cache_memory_bytes": 1, "num_gpu_blocks_override": 1}, "give one"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_by_the_flag_s_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("block_size", [1, 2, 16, 256])
def test_powers_of_two_are_block_sizes(block_size: int) -> None:
    assert EngineArgs(block_size=block_size).block_size == block_size


class _TorchDtype:
    """Prints as torch's do."""

    def __str__(self) -> str:
        return "torch.float16"


@pytest.mark.parametrize(("given", "meant"), [("half", "float16"), ("float", "float32"), (_TorchDtype(), "float16")])
def test_dtype_takes_aliases(given: Any, meant: str) -> None:
    assert EngineArgs(dtype=given).dtype == meant


def test_a_copy_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--port is 70000"):
        msgspec.structs.replace(ServerArgs(), port=70000)


def test_a_list_of_keys_becomes_a_tuple_and_an_empty_key_is_refused() -> None:
    keys: Any = ["a", "b"]
    assert ServerArgs(api_key=keys).api_key == ("a", "b")
    with pytest.raises(ConfigError, match="--api-key"):
        ServerArgs(api_key=("",))


@pytest.mark.parametrize("struct", [EngineArgs, ServerArgs])
def test_every_field_is_documented_and_its_default_is_valid(struct: type[EngineArgs | ServerArgs]) -> None:
    settings = settings_of(struct)
    assert [setting.name for setting in settings] == [field.name for field in msgspec.structs.fields(struct)]
    for setting in settings:
        assert len(setting.help) > 20
        assert setting.kind in (bool, int, float, str)
        struct(**{setting.name: setting.default})
