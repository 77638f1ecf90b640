"""A conversation without a terminal and over a scripted server: history, commands, errors, the loop."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from octavo.cli.chat import ALIASES, COMMANDS, SETTINGS, Conversation, changed, summary, talk
from octavo.cli.remote import Listener, ServerError
from octavo.cli.screen import Screen
from octavo.cli.session import Answer
from octavo.core.errors import EngineDead


class ScriptedServer:
    """Answers "<question>"; words in it change the script."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.settings: dict[str, Any] = {}

    def ask(self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any], listener: Listener) -> Answer:
        question = messages[-1]["content"]
        self.asked.append([(message["role"][0], message["content"]) for message in messages])
        self.settings = dict(settings)
        if "fail" in question:
            raise ServerError("the prompt is too long", "too_long")
        if "die" in question:
            raise ServerError("the engine has stopped: out of luck", "engine_dead")
        if "think" in question:
            listener.think("well ...")
        if "mute" in question:
            return Answer(finish_reason="abort")
        text = f"<{question}"
        listener.say(text)
        if "stop" in question:
            return Answer(text, num_tokens=2, first=0.1, last=0.1, finish_reason="abort")
        listener.say(">")
        return Answer(text + ">", num_tokens=3, first=0.5, last=1.5, finish_reason="stop")


class Chat(Conversation):
    """A conversation and what it shows."""

    def __init__(self, system: str | None = None) -> None:
        self.script, self.out, self.err = ScriptedServer(), io.StringIO(), io.StringIO()
        consoles = [Console(file=file, width=200, force_terminal=False) for file in (self.out, self.err)]
        super().__init__(self.script, Screen(*consoles), {}, system)

    @property
    def asked(self) -> list[tuple[str, str]]:
        """The messages of the last request: roles' first letters and contents."""
        return self.script.asked[-1]


@pytest.fixture
def chat() -> Chat:
    return Chat()


def test_each_turn_sends_the_whole_conversation(chat: Chat) -> None:
    assert chat.take("one")
    assert chat.take("two")
    assert chat.script.asked == [[("u", "one")], [("u", "one"), ("a", "<one>"), ("u", "two")]]
    assert chat.out.getvalue() == "<one>\n<two>\n"
    assert chat.err.getvalue() == "3 tokens, the first after 0.50 s, then 2.0 tokens/s\n" * 2


def test_a_system_message_begins_every_conversation() -> None:
    chat = Chat("be brief")
    chat.take("one")
    assert chat.asked == [("s", "be brief"), ("u", "one")]
    chat.take("/clear")
    chat.take("two")
    assert chat.asked == [("s", "be brief"), ("u", "two")]
    chat.take("/system be long")
    chat.take("three")
    assert chat.asked == [("s", "be long"), ("u", "three")]
    chat.take("/system")
    chat.take("four")
    assert chat.asked == [("u", "four")]


def test_help_names_every_command_and_setting(chat: Chat) -> None:
    assert chat.take("/help")
    shown = chat.err.getvalue()
    assert all(name in shown for name in (*COMMANDS, *ALIASES, *SETTINGS))
    assert chat.script.asked == []


def test_blank_lines_and_unknown_commands_ask_nothing(chat: Chat) -> None:
    assert chat.take("")
    assert chat.take("/what is this")
    assert "unknown command /what:" in chat.err.getvalue()
    assert chat.script.asked == []


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_leaving(chat: Chat, command: str) -> None:
    assert not chat.take(command)


def test_retry_replaces_the_answer(chat: Chat) -> None:
    chat.take("/retry")
    assert "no question" in chat.err.getvalue()
    chat.take("one")
    chat.take("two")
    chat.take("/retry")
    assert chat.asked == [("u", "one"), ("a", "<one>"), ("u", "two")]
    assert len(chat.messages) == 4


def test_undo_forgets_turn_by_turn(chat: Chat) -> None:
    chat.take("one")
    chat.take("two")
    chat.take("/undo")
    assert "forgotten: two" in chat.err.getvalue()
    chat.take("three")
    assert chat.asked == [("u", "one"), ("a", "<one>"), ("u", "three")]
    for _ in range(3):
        chat.take("/undo")
    assert chat.messages == []
    assert "nothing to undo" in chat.err.getvalue()
    chat.take("/retry")
    assert len(chat.script.asked) == 3


def test_an_error_keeps_the_history_and_can_be_retried(chat: Chat) -> None:
    chat.take("one")
    chat.take("fail")
    assert "the prompt is too long" in chat.err.getvalue()
    assert chat.failures == 1
    chat.take("/retry")
    assert chat.asked == [("u", "one"), ("a", "<one>"), ("u", "fail")]
    chat.take("two")
    assert chat.asked == [("u", "one"), ("a", "<one>"), ("u", "two")]


def test_a_stopped_answer_stays_as_far_as_it_came(chat: Chat) -> None:
    chat.take("stop")
    assert chat.interrupted
    assert "2 tokens, the first after 0.10 s, stopped" in chat.err.getvalue()
    chat.take("one")
    assert chat.asked == [("u", "stop"), ("a", "<stop"), ("u", "one")]
    assert not chat.interrupted


def test_a_question_without_an_answer_is_forgotten(chat: Chat) -> None:
    chat.take("mute")
    assert "no tokens, stopped" in chat.err.getvalue()
    chat.take("one")
    assert chat.asked == [("u", "one")]


def test_reasoning_is_shown_apart_and_not_sent_again(chat: Chat) -> None:
    chat.take("think")
    assert chat.err.getvalue().startswith("well ...\n3 tokens")
    assert chat.out.getvalue() == "<think>\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "<think>"}


def test_a_dead_engine_ends_the_program(chat: Chat) -> None:
    with pytest.raises(EngineDead, match="out of luck"):
        chat.take("die")


def test_settings_go_with_each_request(chat: Chat) -> None:
    chat.take("/set")
    assert "the server's own settings" in chat.err.getvalue()
    chat.take('/set temperature=0.2 max_tokens=40 stop=\'["a b", "c"]\'')
    chat.take("one")
    assert chat.script.settings == {"temperature": 0.2, "max_tokens": 40, "stop": ["a b", "c"]}
    chat.take("/set temperature=9000")
    assert "temperature is 9000" in chat.err.getvalue()
    chat.take("/set temperature= stop=END")
    chat.take("two")
    assert chat.script.settings == {"max_tokens": 40, "stop": "END"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature=1", "'temprature=1' is not NAME=VALUE"),
        ("temperature", "is not NAME=VALUE"),
        ("n=2", "is not NAME=VALUE"),
        ("max_tokens=many", "max_tokens must be a number"),
        ("top_p=0", "top_p is 0"),
        ("stop='open", "quotation"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed({"seed": 1}, text)


def test_settings_of_the_server_pass_as_they_are() -> None:
    wanted = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert changed({}, """chat_template_kwargs='{"enable_thinking": false}' reasoning_effort=low""") == wanted


def test_saved_conversations_are_loaded(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat.take("/system be brief")
    chat.take("une idée")
    chat.take(f"/save {file}")
    assert json.loads(file.read_text("utf-8")) == chat.messages
    assert "idée" in file.read_text("utf-8")
    chat.take(f"/save {file}")  # a conversation may be overwritten
    assert chat.err.getvalue().count("3 messages saved") == 2

    other = Chat()
    other.take(f"/load {file}")
    other.take("two")
    assert other.asked == [("s", "be brief"), ("u", "une idée"), ("a", "<une idée>"), ("u", "two")]
    other.take("/undo")
    other.take(f"/load {file}")
    other.take("/retry")
    assert other.asked == [("s", "be brief"), ("u", "une idée")]
    other.take("/new")
    assert other.messages == [{"role": "system", "content": "be brief"}]


@pytest.mark.parametrize(
    "content", [b"# my notes", b"\xff", b'{"role": "user"}', b'[{"role": "user"}]', b'[{"role": "x", "content": ""}]']
)
def test_other_files_are_neither_loaded_nor_overwritten(chat: Chat, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes"
    file.write_bytes(content)
    chat.take("one")
    before = chat.messages
    chat.take(f"/load {file}")
    chat.take(f"/save {file}")
    assert chat.err.getvalue().count("holds no conversation") == 2
    assert file.read_bytes() == content
    assert chat.messages == before


def test_files_that_cannot_be_had_are_said(chat: Chat, tmp_path: Path) -> None:
    chat.take("/save")
    chat.take("/load")
    assert chat.err.getvalue().count("name a file") == 2
    chat.take(f"/load {tmp_path / 'none'}")
    assert "not loaded: [Errno 2]" in chat.err.getvalue()
    chat.take(f"/save {tmp_path / 'none' / 'none'}")
    assert "not saved: [Errno 2]" in chat.err.getvalue()


def test_summary_says_why_an_answer_ended() -> None:
    assert summary(Answer(num_tokens=1, first=0.5, last=0.5, finish_reason="length")).endswith(", cut off at the limit")
    assert summary(Answer(num_tokens=1, first=0.5, last=0.5, finish_reason="stop")).endswith("0.50 s")


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Lines as they are read; an exception is raised, the end of input after all of them."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_the_loop_ends_with_the_input_or_a_goodbye(chat: Chat) -> None:
    talk(chat, typed("one", "two"), interactive=False)
    talk(chat, typed("/quit", "three"), interactive=True)
    assert [asked[-1] for asked in chat.script.asked] == [("u", "one"), ("u", "two")]


def test_ctrl_c_at_the_prompt_leaves_only_a_script(chat: Chat) -> None:
    talk(chat, typed(KeyboardInterrupt, "one"), interactive=True)
    assert "Ctrl-D or /quit leaves" in chat.err.getvalue()
    assert len(chat.script.asked) == 1
    with pytest.raises(KeyboardInterrupt):
        talk(chat, typed(KeyboardInterrupt, "one"), interactive=False)


def test_a_stopped_answer_ends_a_script(chat: Chat) -> None:
    talk(chat, typed("stop", "one"), interactive=True)
    assert len(chat.script.asked) == 2
    talk(chat, typed("stop", "one"), interactive=False)
    assert len(chat.script.asked) == 3
