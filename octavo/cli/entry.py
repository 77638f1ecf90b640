"""Parses the command line and runs one command; turns errors into one line and an exit code.

Exit codes: 0 done, 1 the engine failed, 2 something to correct in what was typed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from octavo.config.flags import add_engine_flags, add_server_flags, spell
from octavo.core.errors import EngineDead, OctavoError

COMMANDS: dict[str, str] = {
    "serve": "Serve a model over an OpenAI-compatible HTTP API",
    "chat": "Chat with a model in the terminal",
    "complete": "Continue a text",
    "bench": "Measure throughput, latency or a running server",
    "plan": "Show which parallel sizes fit a model on given GPUs, and the KV cache that they leave",
    "doctor": "Show which hardware, kernels, versions and settings are used, and why",
}
BENCHES: dict[str, str] = {
    "throughput": "Tokens per second of many requests at once, offline",
    "latency": "Seconds of one batch, offline",
    "serve": "Latencies and throughput of a server under load",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and which takes no abbreviated flags."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class _Version(argparse.Action):
    """Looks the version up only when asked for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"octavo {version('octavo')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv`, by default the process's own; returns its exit code."""
    words = spell(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser(words)
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        commands.get(namespace.command, parser).error(_unknown(unknown[0], commands[namespace.command]))
    try:
        return _runner(namespace.command)(namespace)
    except EngineDead as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser(words: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of its commands; only the command that `words` begin with gets its flags, for speed."""
    parser = Parser(prog="octavo", description="A serving engine for large language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="Show the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Parser] = {
        name: subparsers.add_parser(name, help=text, description=f"{text}.") for name, text in COMMANDS.items()
    }
    if words and words[0] in commands:
        _add_command_flags(words[0], commands[words[0]])
    return parser, commands


def _add_command_flags(command: str, parser: Parser) -> None:
    if command == "bench":
        _add_benches(parser)
        return
    add_engine_flags(parser)
    if command == "serve":
        add_server_flags(parser)
    elif command == "chat":
        _add_sampling_flags(parser)
        _add_chat_flags(parser)
    elif command == "plan":
        importlib.import_module("octavo.cli.plan").add_arguments(parser)
    elif command == "complete":
        _add_sampling_flags(parser)
        parser.add_argument("--prompt", metavar="TEXT", help="What to continue; standard input when absent")


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    system, quick = "System message that begins the conversation", "Ask this, show the answer and leave"
    group.add_argument("--system", "--system-prompt", dest="system", metavar="TEXT", help=system)
    group.add_argument("--quick", metavar="TEXT", help=quick)
    for flag, dest, text in (
        ("--url", "url", "Chat with the server there instead of starting an engine"),
        ("--api-key", "key", "What the server at --url asks for; also from OCTAVO_API_KEY"),
        ("--model-name", "model_name", "Model to ask the server at --url for; its first one when absent"),
    ):
        group.add_argument(flag, dest=dest, metavar="TEXT", help=text)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name, kind, text in (
        ("max_tokens", int, "Most tokens of an answer; what the context holds when absent"),
        ("temperature", float, "0 for the most likely tokens; the model's default when absent"),
        ("top_p", float, "Share of the probability to sample from"),
        ("top_k", int, "Number of most likely tokens to sample from"),
        ("min_p", float, "Least probability of a token, relative to the most likely one's"),
        ("repetition_penalty", float, "Above 1 makes repetitions less likely"),
    ):
        metavar = "N" if kind is int else "X"
        group.add_argument("--" + name.replace("_", "-"), dest=name, type=kind, metavar=metavar, help=text)


def _add_benches(parser: argparse.ArgumentParser) -> None:
    from octavo.bench import add_arguments

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    for kind, text in BENCHES.items():
        add_arguments(kind, kinds.add_parser(kind, help=text, description=f"{text}."))


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """What to say of `word`, with the nearest flag that the command shows."""
    name = word.partition("=")[0]
    known = [
        flag
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for flag in action.option_strings
        if flag.startswith("--")
    ]
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown argument {name}" + (f": did you mean {close[0]}?" if close else "")


def _runner(command: str) -> Callable[[argparse.Namespace], int]:
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"octavo.cli.{command}").run
    return run
