"""Work on hostile text, counted in calls, grows no faster than the text. tools/parser_speed.py measures time."""

from __future__ import annotations

import sys
from types import FrameType

import pytest

from octavo.text.parsing import Content, merged
from tools.parser_speed import OPENINGS, parser, repeated, texts

SIZE = 4_000


def steps(name: str, text: str, piece: int) -> int:
    """Python function calls (generators' resumptions included) of one parse."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event.endswith("call")

    reader = parser(name)
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for part in pieces:
            reader.push(part)
        reader.finish()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", OPENINGS)
def test_work_is_linear(name: str) -> None:
    for opening, pattern in list(texts(name))[::11]:
        text = repeated(opening, pattern, SIZE)
        assert steps(name, text, 4) < 60 * SIZE, (opening, pattern)
        assert steps(name, text + text[len(opening) :], SIZE) < 3 * steps(name, text, SIZE) + 500, (opening, pattern)


MARKS = {
    "hermes": "<tool_call>",
    "granite": "<|tool_call|>",
    "mistral": "[TOOL_CALLS]",
    "kimi_k2": "<|tool_call_begin|>",
    "deepseek_v3": "<｜tool▁call▁begin｜>",
    "qwen3_coder": "<function=",
    "glm45": "<tool_call>",
    "pythonic": "<|python_start|>",
    "llama3_json": "<|python_tag|>",
}


@pytest.mark.parametrize("name", MARKS)
def test_the_budget_ends_parsing_not_text(name: str) -> None:
    """Very many marks without a call: all of it is content, whether or not it was still looked at."""
    text = f"{MARKS[name]}!" * 5000
    reader = parser(name)
    assert merged(reader.push(text) + reader.finish()) == [Content(text)]
