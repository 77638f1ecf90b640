"""The command line made from the fields."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest

from octavo.config.args import Args, EngineArgs, ServerArgs, Setting, settings_of
from octavo.config.compat import HARMLESS, REFUSED, SWITCHES
from octavo.config.flags import add_engine_flags, add_server_flags, integer, parse_given, spell
from octavo.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BOTH: list[tuple[type[Args], Setting]] = [(s, setting) for s in (EngineArgs, ServerArgs) for setting in settings_of(s)]
SPECIAL = {
    "generation_config": "vllm",
    "device": "cuda:1",
    "seed": 7,
    "gpu_memory_utilization": 0.5,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "block_size": 32,
}


def parse(*words: str) -> tuple[EngineArgs, ServerArgs, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_flags(parser)
    add_server_flags(parser)
    return parse_given(parser.parse_args(spell(words)))


def value_for(setting: Setting) -> Any:
    """A valid value other than the default, where there is one."""
    if setting.name in SPECIAL:
        return SPECIAL[setting.name]
    if setting.kind is bool:
        return not setting.default
    if setting.choices is not None:
        return setting.choices[-1]
    return {int: 9, str: "text"}[setting.kind]


def test_nothing_given_is_all_defaults() -> None:
    assert parse() == (EngineArgs(), ServerArgs(), [])


@pytest.mark.parametrize(("struct", "setting"), BOTH, ids=[setting.name for _, setting in BOTH])
def test_every_field_has_a_flag_that_sets_it(struct: type[Args], setting: Setting) -> None:
    value = value_for(setting)
    if setting.kind is bool:
        words = [setting.flag if value else f"--no-{setting.flag[2:]}"]
    else:
        words = [setting.flag, str(value)]
    engine, server, dropped = parse(*words)
    parsed = engine if struct is EngineArgs else server
    assert getattr(parsed, setting.name) == ((value,) if setting.many else value)
    assert parsed == struct(**{setting.name: (value,) if setting.many else value})
    assert dropped == []


def test_model_stands_alone_or_behind_its_flag_but_not_both() -> None:
    assert parse("m")[0].model == parse("--model", "m")[0].model == "m"
    with pytest.raises(ConfigError, match="MODEL is given twice"):
        parse("m", "--model", "n")


def test_several_values_and_underscores() -> None:
    _, server, _ = parse("--api-key", "a", "b", "--served_model_name=one_two")
    assert server.api_key == ("a", "b")
    assert server.served_model_name == ("one_two",)


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_every_harmless_flag_is_parsed_and_dropped(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    assert len(parse(flag)[2] if name in SWITCHES else parse(flag, "1")[2]) == 1


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_flag_is_parsed_and_refused(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    words = [flag] if name in SWITCHES else [flag, "zzz"]
    if "true" in REFUSED[name]:
        words = [f"--no-{flag[2:]}"]
    with pytest.raises(ConfigError, match="is not built yet"):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("8k", 8000), ("8K", 8192), ("1.5K", 1536), ("4G", 4 << 30), ("-1", -1)]
)
def test_whole_numbers_may_end_in_a_unit(text: str, number: int) -> None:
    assert integer(text) == number


@pytest.mark.parametrize("text", ["", "k", "1.0001k", "1.5", "8kb", "0x10", "1e3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        integer(text)


def test_the_documentation_is_the_fields() -> None:
    document = runpy.run_path(str(ROOT / "tools" / "flag_table.py"))["document"]()
    assert (ROOT / "docs" / "flags.md").read_text() == document, "run: python tools/flag_table.py > docs/flags.md"
    for _, setting in BOTH:
        assert f"`{setting.flag}" in document
        assert setting.help in document
