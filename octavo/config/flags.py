"""Command-line flags made from the fields of the argument structs, and structs made from what was given.

Every command that starts an engine uses these, so all take the same flags. A flag of vLLM that Octavo lacks is
parsed too, though not shown, and `compat.py` says what becomes of it. Owns no setting.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from octavo.config.args import Args, EngineArgs, ServerArgs, Setting, flag_of, settings_of
from octavo.config.compat import HARMLESS, REFUSED, SWITCHES, split
from octavo.core.errors import ConfigError

SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "quantization": "-q",
    "optimization_level": "-O",
}
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def integer(text: str) -> int:
    """A whole number, also as 8k (8000) or 8K (8192), up to t and T. Raises ValueError."""
    match = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?)([kmgtKMGT])", text)
    if match is None:
        return int(text)
    number = float(match[1]) * _SUFFIXES[match[2]]
    if number != int(number):
        raise ValueError(f"{text} is no whole number")
    return int(number)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL and a flag for every field of EngineArgs, and hidden ones for vLLM's others."""
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=_help(settings_of(EngineArgs)[0])
    )
    _add_flags(parser.add_argument_group("engine"), EngineArgs)
    hidden = parser.add_argument_group()
    for name in sorted(HARMLESS | REFUSED.keys()):
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if name in SWITCHES else {}
        hidden.add_argument(*_names(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of ServerArgs."""
    _add_flags(parser.add_argument_group("server"), ServerArgs)


def _add_flags(group: argparse._ArgumentGroup, struct: type[Args]) -> None:
    for setting in settings_of(struct):
        if setting.name == "model":
            group.add_argument(
                "--model", dest="model_flag", default=argparse.SUPPRESS, metavar="MODEL", help="The same as MODEL"
            )
            continue
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = integer if setting.kind is int else setting.kind
            options["metavar"] = _metavar(setting)
        if setting.many:
            options |= {"nargs": "+", "action": "extend"}
        group.add_argument(*_names(setting.name), **options)


def _names(name: str) -> list[str]:
    return [SHORT[name], flag_of(name)] if name in SHORT else [flag_of(name)]


def _metavar(setting: Setting) -> str:
    if setting.choices is not None:
        return "{" + ",".join(map(str, setting.choices)) + "}"
    return {int: "N", float: "X", str: "TEXT"}[setting.kind]


def _help(setting: Setting) -> str:
    shown = setting.default not in (None, ()) and setting.kind is not bool
    return (setting.help + (f" (default: {setting.default})" if shown else "")).replace("%", "%%")


def spell(argv: Sequence[str]) -> list[str]:
    """`argv` with underscores in the names of long flags made dashes, as vLLM takes both."""
    spelled = []
    for word in argv:
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return spelled


def parse_given(namespace: argparse.Namespace) -> tuple[EngineArgs, ServerArgs, list[str]]:
    """Both structs from the flags that were given, and a line about each flag that was dropped.

    Values in `namespace` that are no flags of engine or server are left alone. Raises ConfigError.
    """
    names = {setting.name for struct in (EngineArgs, ServerArgs) for setting in settings_of(struct)}
    given = {name: value for name, value in vars(namespace).items() if name in names | HARMLESS | REFUSED.keys()}
    if "model_flag" in namespace:
        if "model" in given:
            raise ConfigError(f"MODEL is given twice, {given['model']} and --model {namespace.model_flag}: give one")
        given["model"] = namespace.model_flag
    return split(given)
