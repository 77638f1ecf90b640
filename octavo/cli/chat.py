"""`octavo chat`: a conversation in the terminal, with an engine of its own."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from octavo.cli.session import Session, open_session
from octavo.core.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console

COMMANDS = {
    "/help": "show these commands",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message and forget the conversation; without TEXT the model's own",
    "/exit": "leave, as does Ctrl-D; Ctrl-C ends an answer",
}


class Conversation:
    """The messages so far. Reads commands and questions, writes answers to `console`."""

    def __init__(self, session: Session, console: Console, system: str | None) -> None:
        self.session, self.console = session, console
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def take(self, line: str) -> bool:
        """Answers one line; False when it says goodbye."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/help":
                for name, text in COMMANDS.items():
                    self._note(f"{name:<14}{text}")
            case "/reset":
                self.reset()
                self._note("the conversation begins anew")
            case "/system":
                self.system = rest.strip() or None
                self.reset()
                self._note("the conversation begins anew")
            case _ if command.startswith("/"):
                self._note(f"unknown command {command}: /help shows those there are")
            case _:
                self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        template = self.session.llm.chat_template
        assert template is not None
        messages = [*self.messages, {"role": "user", "content": line}]
        try:
            answer = self.session.ask(template.render(messages), self._show, rendered=True)
        except InvalidRequest as error:
            self._note(f"{error} (/reset forgets the conversation)")
            return
        self.console.print()
        self._note(answer.speed)
        if answer.text:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _show(self, text: str) -> None:
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def run(namespace: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    with open_session(namespace) as session:
        if session.llm.chat_template is None:
            raise ConfigError(f"{session.llm.facts.path} has no chat template: use octavo complete")
        conversation = Conversation(session, console, namespace.system)
        console.print("Type a message; /help shows the commands.", style="dim", highlight=False)
        while (line := _read()) is not None and conversation.take(line):
            pass
    return 0


def _read() -> str | None:
    """The next line; None at the end of input or on Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and editing
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
