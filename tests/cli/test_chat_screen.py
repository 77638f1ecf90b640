"""How answers are wrapped and shown, and how messages are read."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from octavo.cli.screen import Screen, Wrapper, line_reader, read_message


def wrapped(text: str, width: int, sizes: list[int] | None = None) -> str:
    """`text` wrapped, pushed in pieces of `sizes`."""
    wrapper, out, sizes = Wrapper(), [], [*(sizes or [])]
    while text:
        size = sizes.pop() if sizes else len(text)
        out.append(wrapper.push(text[:size], width))
        text = text[size:]
    return "".join([*out, wrapper.finish(width)])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("exactly ten", "exactly\nten"),
        ("0123456789 a", "0123456789\na"),
        ("0123456789abc d", "0123456789\nabc d"),
        ("    code\n    more", "    code\n    more"),
        ("\tx", "    x"),
        ("a\n\nb", "a\n\nb"),
        ("日本語の文字列", "日本語の文\n字列"),
        ("a 日本語の文字列", "a 日本語の\n文字列"),
        ("12345678 👩\u200d👩\u200d👧", "12345678 \n👩\u200d👩\u200d👧".replace(" \n", "\n")),
    ],
)
def test_text_is_broken_between_words(text: str, shown: str) -> None:
    assert wrapped(text, 10) == shown


@given(st.text(st.sampled_from("ab é日\n  \t")), st.integers(2, 12), st.lists(st.integers(1, 4)))
def test_wrapping_loses_nothing_and_keeps_to_the_width(text: str, width: int, sizes: list[int]) -> None:
    shown = wrapped(text, width, sizes)
    assert shown == wrapped(text, width)
    assert "".join(shown.split()) == "".join(text.split())
    assert all(cell_len(line.strip()) <= width for line in shown.split("\n"))


def terminal(width: int = 20) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard", legacy_windows=False)
    return Screen(console, console), file


def test_a_terminal_shows_thoughts_dimmed_and_answers_wrapped() -> None:
    screen, file = terminal()
    screen.think("let me see ")
    screen.think("what there is to say")
    screen.say("the answer is 42, said he :smile: [b]")
    screen.end()
    thought, _, answer = file.getvalue().partition("the answer")
    assert thought.count("\x1b[2m") >= 2
    plain = thought.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain == "let me see what\nthere is to say\n"
    assert answer == " is 42,\nsaid he :smile: [b]\n"


def test_an_answer_cannot_command_the_terminal() -> None:
    screen, file = terminal()
    screen.say("a\x1b]0;title\x07\x9b2J\r\n")
    screen.end()
    assert file.getvalue() == "a␛]0;title␇\ufffd2J\n\n"


def test_waiting_shows_a_spinner_that_goes_away() -> None:
    screen, file = terminal()
    screen.begin()
    screen.say("x")
    screen.end()
    screen.begin()
    screen.end()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 2


def test_elsewhere_answers_come_as_they_are_and_without_colours() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(Console(file=out, width=10, force_terminal=False), Console(file=err, force_terminal=False))
    screen.begin()
    screen.think("hm")
    screen.say("a long answer\tthat is not wrapped \x1b")
    screen.end()
    screen.fail("no")
    assert out.getvalue() == "a long answer\tthat is not wrapped \x1b\n"
    assert err.getvalue() == "hm\nno\n"


def reader(text: str) -> tuple[Callable[[str], str], list[str]]:
    lines, prompts = iter(text.split("\n")), []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    return read, prompts


@pytest.mark.parametrize(
    ("text", "message", "prompts"),
    [
        ("hello ", "hello", "> "),
        ("one\\\ntwo\\\nthree", "one\ntwo\nthree", "> ... ... "),
        ("one\\", "one\n", "> ... "),
        ('"""one\n  two\n\nthree"""', "one\n  two\n\nthree", "> ... ... ... "),
        ('"""\none\n"""', "one", "> ... ... "),
        ('"""one"""', "one", "> "),
        ('"""one\ntwo', "one\ntwo", "> ... ... "),
        ('"""', "", "> ... "),
        ("", "", "> "),
    ],
)
def test_messages_of_several_lines(text: str, message: str, prompts: str) -> None:
    read, seen = reader(text)
    assert read_message(read) == message
    assert "".join(seen) == prompts


def test_the_end_of_input_is_no_message() -> None:
    def read(prompt: str) -> str:
        raise EOFError

    assert read_message(read) is None


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    read = line_reader(["/help"])
    assert [read_message(read) for _ in range(4)] == ["one", "", "two", None]
    assert capsys.readouterr().out == ""
