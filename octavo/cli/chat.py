"""`octavo chat`: a conversation in the terminal, with a running server or an engine of its own.

Owns the history, the settings and the commands; `remote` asks the server, `screen` shows and reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from octavo.cli.screen import Screen, line_reader, read_message
from octavo.cli.session import SAMPLING, Answer
from octavo.core.errors import ConfigError, EngineDead
from octavo.core.params import SamplingParams

if TYPE_CHECKING:
    from octavo.cli.remote import ChatServer, Listener

Messages = list[dict[str, str]]

SETTINGS = (
    *("max_tokens", *SAMPLING, "presence_penalty", "frequency_penalty", "seed", "stop"),
    *("reasoning_effort", "chat_template_kwargs", "response_format", "structured_outputs"),
)
"""Fields of the request that /set knows. The first line is checked here, the others by the server."""
ROLES = ("system", "user", "assistant")


class Server(Protocol):
    """What a conversation needs of `remote.ChatServer`."""

    def ask(self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any], listener: Listener) -> Answer:
        """Raises ServerError."""
        ...


class Conversation:
    """The messages so far and the settings. Reads commands and questions, shows answers on `screen`."""

    def __init__(self, server: Server, screen: Screen, settings: dict[str, Any], system: str | None) -> None:
        self.server, self.screen, self.settings = server, screen, settings
        self.messages: Messages = []
        self.failures = 0
        self.interrupted = False
        self.left = False
        self._system = system
        self._question = ""
        self._clear()

    def take(self, text: str) -> bool:
        """Answers one message or obeys one command; False when it says goodbye."""
        name, _, rest = text.partition(" ")
        name = ALIASES.get(name, name)
        if name in COMMANDS:
            COMMANDS[name].obey(self, rest.strip())
        elif name.startswith("/"):
            self.screen.fail(f"unknown command {name}: /help shows those there are")
        elif text:
            self._answer(text)
        return not self.left

    def _answer(self, question: str) -> None:
        from octavo.cli.remote import ServerError

        self._question = question
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            answer = self._ask(messages)
        except ServerError as error:
            if error.code == "engine_dead":
                raise EngineDead(str(error)) from None
            self.failures += 1
            self.screen.fail(f"{error} (/retry asks again)")
            return
        self.screen.note(summary(answer))
        self.interrupted = answer.finish_reason == "abort"
        if answer.text:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _ask(self, messages: Messages) -> Answer:
        self.screen.begin()
        try:
            return self.server.ask(messages, self.settings, self.screen)
        finally:
            self.screen.end()

    def _clear(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._question = ""

    def help(self, _: str) -> None:
        self.screen.table([(f"{name} {command.takes}", command.help) for name, command in COMMANDS.items()])
        self.screen.note('A line that ends in \\ goes on in the next; """ begins and ends a message of several lines.')
        self.screen.note("Ctrl-C stops an answer, Ctrl-D leaves.")

    def clear(self, _: str) -> None:
        self._clear()
        self.screen.note("the conversation begins anew")

    def system(self, text: str) -> None:
        self._system = text or None
        self.clear("")

    def set(self, text: str) -> None:
        try:
            self.settings = changed(self.settings, text)
        except ValueError as error:
            self.screen.fail(str(error))
            return
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in self.settings.items())
        self.screen.note(told or "the server's own settings")

    def undo(self, _: str) -> None:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            self.screen.fail("there is nothing to undo")
            return
        self.screen.note(f"forgotten: {self.messages[asked[-1]]['content']}")
        self.messages = self.messages[: asked[-1]]
        self._question = ""

    def retry(self, _: str) -> None:
        """The last question again, in place of its answer where it had one."""
        if self.messages[-2:-1] == [{"role": "user", "content": self._question}]:
            del self.messages[-2:]
        if self._question:
            self._answer(self._question)
        else:
            self.screen.fail("there is no question to ask again")

    def save(self, name: str) -> None:
        try:
            path = _path(name)
            if path.exists():
                read_conversation(path)  # overwrites conversations only
            path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            self.screen.fail(f"not saved: {error}")
            return
        self.screen.note(f"{len(self.messages)} messages saved in {path}")

    def load(self, name: str) -> None:
        try:
            messages = read_conversation(_path(name))
        except (OSError, ValueError) as error:
            self.screen.fail(f"not loaded: {error}")
            return
        self._system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.messages = messages
        self._question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        self.screen.note(f"{len(messages)} messages loaded from {name}")

    def leave(self, _: str) -> None:
        self.left = True


@dataclass(frozen=True)
class Command:
    takes: str
    help: str
    obey: Callable[[Conversation, str], None]


COMMANDS = {
    "/help": Command("", "show these commands", Conversation.help),
    "/new": Command("", "forget the conversation (also /clear)", Conversation.clear),
    "/system": Command("[TEXT]", "begin anew with this system message, or the model's own", Conversation.system),
    "/set": Command("[NAME=VALUE ...]", f"change or show {', '.join(SETTINGS)}", Conversation.set),
    "/retry": Command("", "ask the last question again", Conversation.retry),
    "/undo": Command("", "forget the last question and its answer", Conversation.undo),
    "/save": Command("FILE", "write the conversation to a file, as JSON", Conversation.save),
    "/load": Command("FILE", "go on with a conversation that was saved", Conversation.load),
    "/quit": Command("", "leave (also /exit)", Conversation.leave),
}
ALIASES = {"/clear": "/new", "/exit": "/quit"}


def summary(answer: Answer) -> str:
    """How much came, how fast, and why it ended where that was not by itself."""
    ends = {"length": ", cut off at the limit", "abort": ", stopped"}
    return answer.speed + ends.get(answer.finish_reason or "", "")


def changed(settings: Mapping[str, Any], text: str) -> dict[str, Any]:
    """`settings` with the changes of `text`, NAME=VALUE ..., values in JSON or bare; no value removes one.

    Raises ValueError that says what is wrong.
    """
    settings = dict(settings)
    for word in shlex.split(text):
        name, equals, value = word.partition("=")
        if not equals or name not in SETTINGS:
            raise ValueError(f"{word!r} is not NAME=VALUE with one of {', '.join(SETTINGS)}")
        settings.pop(name, None)
        if value:
            settings[name] = _value(value)
    check(settings)
    return settings


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def check(settings: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for sampling parameters out of bounds."""
    names = [name for name in settings if name in SamplingParams.__struct_fields__ and name != "structured_outputs"]
    SamplingParams(**{name: settings[name] for name in names})


def _path(name: str) -> Path:
    if not name:
        raise ValueError("name a file")
    return Path(name).expanduser()


def read_conversation(path: Path) -> Messages:
    """What /save wrote. Raises OSError, ValueError."""
    try:
        messages = msgspec.json.decode(path.read_bytes(), type=Messages)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no conversation: {error}") from None
    for message in messages:
        if set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ValueError(f"{path} holds no conversation: messages have a role of {', '.join(ROLES)} and a content")
    return messages


def run(namespace: argparse.Namespace) -> int:
    from rich.console import Console

    given = {name: value for name in ("max_tokens", *SAMPLING) if (value := getattr(namespace, name)) is not None}
    check(given)
    interactive = sys.stdin.isatty() and namespace.quick is None
    out = Console(force_terminal=None if sys.stdin.isatty() else False)
    screen = Screen(out, out if out.is_terminal else Console(stderr=True, force_terminal=False))
    with open_server(namespace) as server:
        conversation = Conversation(server, screen, given, namespace.system)
        if namespace.quick is not None:
            conversation.take(namespace.quick)
        else:
            if interactive:
                screen.note(f"{server.model}. Type a message; /help shows the commands.")
            talk(conversation, line_reader([*COMMANDS, *ALIASES]), interactive)
    if not interactive and conversation.interrupted:
        return 130
    return 1 if not interactive and conversation.failures else 0


def talk(conversation: Conversation, read: Callable[[str], str], interactive: bool) -> None:
    """Takes messages until the end of input or /quit. Where nobody types, Ctrl-C ends it too."""
    while True:
        try:
            text = read_message(read)
            if text is None:
                if interactive:
                    print()
                return
            if not conversation.take(text) or (conversation.interrupted and not interactive):
                return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            conversation.screen.note("Ctrl-D or /quit leaves")


@contextmanager
def open_server(namespace: argparse.Namespace) -> Iterator[ChatServer]:
    """The server at --url, or one of its own that the engine's flags describe. Raises ConfigError, EngineDead."""
    from octavo.cli.own import own_server
    from octavo.cli.remote import connect
    from octavo.cli.serve import KEY_VARIABLE
    from octavo.cli.terminal import log_to_stderr
    from octavo.config.args import EngineArgs
    from octavo.config.flags import parse_given

    args, _, dropped = parse_given(namespace)
    log_to_stderr(logging.WARNING, dropped)
    if namespace.url is None:
        for flag, value in (("--model-name", namespace.model_name), ("--api-key", namespace.key)):
            if value is not None:
                raise ConfigError(f"{flag} is for a server that runs: give --url too")
        with own_server(args) as (url, key), connect(url, key, None, trust_env=False) as server:
            yield server
        return
    if args != EngineArgs():
        raise ConfigError("--url talks to a server that runs: leave out MODEL (--model-name chooses) and engine flags")
    given = namespace.key or os.environ.get(KEY_VARIABLE)
    with connect(namespace.url, given, namespace.model_name) as server:
        yield server
