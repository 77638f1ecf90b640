"""vLLM's arguments that Octavo lacks: dropped with a line, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.config.args import EngineArgs, ServerArgs, settings_of
from octavo.config.compat import HARMLESS, REFUSED, SWITCHES, drop, engine_args_from_kwargs
from octavo.core.errors import ConfigError


def test_no_argument_is_in_two_tables() -> None:
    own = {setting.name for struct in (EngineArgs, ServerArgs) for setting in settings_of(struct)}
    assert not own & HARMLESS
    assert not own & REFUSED.keys()
    assert not HARMLESS & REFUSED.keys()
    assert SWITCHES.issubset(HARMLESS | REFUSED.keys())


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_harmless_argument_is_dropped_with_a_line(name: str) -> None:
    args, lines = engine_args_from_kwargs("m", {name: True})
    assert args == EngineArgs(model="m")
    assert len(lines) == 1
    assert "--" + name.replace("_", "-") in lines[0]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_that_is_not_built_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="is not built yet"):
        drop(name, "something else")
    for neutral in (None, *REFUSED[name]):
        assert "what happens anyway" in drop(name, neutral)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable_lora", True, "--enable-lora is not built yet: leave it out"),
        ("enable_chunked_prefill", False, "--no-enable-chunked-prefill is not built yet: leave it out"),
        ("kv_cache_dtype", "fp8", "--kv-cache-dtype fp8 is not built yet (only 'auto' is): leave it out"),
    ],
)
def test_a_refusal_spells_the_flag_as_it_is_typed(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        drop(name, value)
    assert str(caught.value) == message


def test_keyword_arguments_of_a_vllm_script() -> None:
    args, lines = engine_args_from_kwargs(
        "m",
        {
            "dtype": "float32",
            "max_model_len": 512,
            "trust_remote_code": True,
            "swap_space": 4,
            "quantization": None,
            "enable_prefix_caching": None,
            "served_model_name": "name",
        },
    )
    assert args == EngineArgs(model="m", dtype="float32", max_model_len=512)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_modl_len", "unknown argument max_modl_len: did you mean max_model_len?"),
        ("zzz", "unknown argument zzz"),
        ("port", "unknown argument port"),
    ],
)
def test_unknown_arguments_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_args_from_kwargs("m", {name: 1})
    assert str(caught.value).startswith(message)
