"""Every format's calls, written at random, read whole and in pieces."""

from __future__ import annotations

import json
import random

import pytest

from octavo.text.parsing import Content, Formats, Reasoning, ToolCall
from tests.text.parsing.outputs import (
    HARMONY,
    STYLES,
    Style,
    calls,
    cut,
    dump,
    expected,
    meaning,
    parse,
    prose,
    seeds,
)

SAMPLES = 200


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.format)
def test_calls_between_prose(style: Style) -> None:
    for rng in seeds(SAMPLES):
        wanted = calls(rng)
        before = "" if style.needs_beginning or rng.random() < 0.4 else prose(rng, style.near_misses)
        after = prose(rng, ()) if rng.random() < 0.3 else ""
        space = rng.choice(("", "\n", " \n"))
        text = f"{before}{space}{style.write(wanted, rng)}{space}{after}"
        whole = parse(Formats(style.format), text)
        assert meaning(whole) == expected(before, wanted, after), text
        assert parse(Formats(style.format), text, cut(text, rng)) == whole, text


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.format)
def test_reasoning_before_calls(style: Style) -> None:
    for rng in seeds(SAMPLES // 4):
        wanted = calls(rng)
        thought = prose(rng, (*style.near_misses, "</thin", "<think>", "<tool_call>"))
        inside = rng.random() < 0.5
        space = rng.choice(("", "\n"))
        text = f"{'' if inside else '<think>'}{space}{thought}{space}</think>{space * 2}{style.write(wanted, rng)}"
        formats = Formats(style.format, "qwen3")
        whole = parse(formats, text, in_reasoning=inside)
        thought = thought.removeprefix("<think>") if inside else thought
        assert meaning(whole) == expected("", wanted, reasoning=thought), text
        assert parse(formats, text, cut(text, rng), in_reasoning=inside) == whole, text


def test_harmony() -> None:
    for rng in seeds(SAMPLES):
        wanted = calls(rng)
        thought = prose(rng, HARMONY.near_misses) if rng.random() < 0.6 else ""
        text = f"<|channel|>analysis<|message|>{thought}<|end|>" if thought else ""
        final = ""
        if rng.random() < 0.6:
            text += HARMONY.write(wanted, rng)
        else:
            wanted, final = [], prose(rng, HARMONY.near_misses)
            text += f"<|start|>assistant<|channel|>final<|message|>{final}{rng.choice(('', '<|return|>'))}"
        text = text.removeprefix("<|start|>assistant")
        whole = parse(Formats("openai", "openai_gptoss"), text)
        assert meaning(whole) == expected(final, wanted, reasoning=thought), text
        assert parse(Formats("openai"), text, cut(text, rng)) == whole, text


@pytest.mark.parametrize("style", [*STYLES, HARMONY], ids=lambda style: style.format)
def test_constrained_calls(style: Style) -> None:
    """call="json": the list that required and named choices are constrained to, whatever the format."""
    for rng in seeds(20):
        wanted = calls(rng)
        text = dump([{"name": name, "parameters": arguments} for name, arguments in wanted], rng)
        whole = parse(Formats(style.format), text, call="json")
        assert meaning(whole) == expected("", wanted), text
        assert parse(Formats(style.format), text, cut(text, rng), call="json") == whole


@pytest.mark.parametrize("style", [*STYLES, HARMONY], ids=lambda style: style.format)
def test_damaged_text_in_any_pieces(style: Style) -> None:
    """Outputs with characters removed, added and cut off: the same events for all pieces, and no text is lost."""
    for rng in seeds(SAMPLES):
        text = f"{prose(rng, style.near_misses)} {style.write(calls(rng), rng)}{prose(rng, style.near_misses)}"
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text = (
                text[:at] + rng.choice(("", "", "x", '"', "{", "]", "<", "\n", "\\")) + text[at + rng.randint(0, 3) :]
            )
        if rng.random() < 0.5:
            text = text[: rng.randrange(len(text) + 1)]
        formats = Formats(style.format, rng.choice((None, "qwen3")))
        inside = rng.random() < 0.3
        whole = parse(formats, text, in_reasoning=inside)
        for _ in range(3):
            assert parse(formats, text, cut(text, rng), in_reasoning=inside) == whole, text
        if not any(isinstance(event, ToolCall) for event in whole) and style is not HARMONY:
            shown = "".join(event.text for event in whole if isinstance(event, Content | Reasoning))
            kept = text.replace("<think>", "").replace("</think>", "")
            assert "".join(shown.split()) == "".join(kept.split()), text


@pytest.mark.parametrize("style", [*STYLES, HARMONY], ids=lambda style: style.format)
def test_no_text_is_lost_at_a_cut(style: Style) -> None:
    """An output that ends anywhere, in a marker, a header, a name or a value, is shown to its last character."""
    for rng in seeds(SAMPLES):
        text = f"{'' if style.needs_beginning else prose(rng, style.near_misses)}{style.write(calls(rng), rng)}"
        text = text[: rng.randrange(len(text) + 1)] + "the~end"
        whole = parse(Formats(style.format), text)
        shown = "".join(event.name if isinstance(event, ToolCall) else event.text for event in whole)
        assert shown.endswith("the~end"), text
        assert parse(Formats(style.format), text, cut(text, rng)) == whole, text


def test_random_json_values_pass_verbatim() -> None:
    rng = random.Random(1)
    for _ in range(SAMPLES):
        depth = rng.randint(1, 40)
        arguments = '{"a":' * depth + rng.choice(('"}"', "[]", "-1.5e+9", '"\\"\\\\"', "null")) + "}" * depth
        json.loads(arguments)
        text = f'<tool_call>{{"name":"f","arguments":{arguments}}}</tool_call>'
        whole = parse(Formats("hermes"), text, cut(text, rng))
        assert getattr(whole[1], "text", "") == arguments
