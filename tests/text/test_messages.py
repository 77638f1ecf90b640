"""Messages as templates expect them, and tools for templates that know none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.core.errors import InvalidRequest
from octavo.text import ChatTemplate, Tokenizer, normalise_messages
from octavo.text.messages import Arguments

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "ask"},
    {
        "role": "assistant",
        "content": "hm",
        "tool_calls": [{"id": i, "function": {"name": i, "arguments": '{"x": "é"}'}} for i in "fg"],
    },
    {"role": "tool", "tool_call_id": "f", "content": "1"},
    {"role": "tool", "tool_call_id": "g", "content": [{"type": "text", "text": "2"}]},
    {"role": "user", "content": "and?"},
]


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_messages_are_made_plain() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no json"}}, {"id": "1"}]},
    ]
    plain = normalise_messages(messages)
    assert [message["content"] for message in plain] == [[text("a"), text("b"), text("c")], "", ""]
    assert plain[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    assert plain[2]["tool_calls"] == messages[2]["tool_calls"]
    assert messages[1]["content"] is None


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"messages\[0\] .*'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part without text"),
        ({"role": "user", "content": 7}, "content must be text"),
        ({"content": "x"}, "with a role"),
        ("text", "with a role"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls must be"),
    ],
)
def test_messages_that_are_refused(message: Any, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        normalise_messages([message])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a | tojson }}", '{"x": "é"}'),
        ("{{ a }}", '{"x": "é"}'),
        ("{{ '<' + a + '>' }}", '<{"x": "é"}>'),
        ("{{ '<' ~ a ~ '>' }}", '<{"x": "é"}>'),
        ("{% for k, v in a | items %}{{ k }}={{ v }}{% endfor %}", "x=é"),
        ("{{ a is mapping }} {{ a is string }} {{ a.x }} {{ a | length }}", "True False é 1"),
    ],
)
def test_arguments_are_an_object_and_text(smollm: Tokenizer, source: str, expected: str) -> None:
    (message,) = normalise_messages([{"role": "assistant", "tool_calls": [CALLS[1]["tool_calls"][0]]}])
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}" + source
    assert ChatTemplate(source, smollm).render([message]) == expected
    assert json.dumps(Arguments(x=1)) == '{"x": 1}'


def test_reasoning_goes_by_all_of_its_names() -> None:
    for name in ("reasoning", "reasoning_content"):
        (message,) = normalise_messages([{"role": "assistant", "content": "a", name: "r"}])
        assert (message["reasoning"], message["reasoning_content"]) == ("r", "r")
        assert "thinking" not in message
    call = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [{"id": "1"}]}
    assert normalise_messages([call])[0]["thinking"] == "r"


def test_tools_are_told_where_the_template_does_not(smollm: Tokenizer) -> None:
    template = ChatTemplate(PLAIN, smollm)
    assert not template.uses("tools")
    told = template.render([{"role": "system", "content": "Be brief."}, CALLS[0]], tools=TOOLS)
    assert told.startswith("[system]Be brief.\n\nYou may call functions")
    assert told.endswith("[user]ask")
    assert json.dumps(TOOLS[0]["function"]) in told
    assert "<tool_call>\n{" in told
    assert template.render([CALLS[0]], tools=TOOLS).startswith("[system]You may call")
    assert template.render([CALLS[0]]) == "[user]ask"


def test_tools_are_told_by_the_user_where_there_is_no_system_message(smollm: Tokenizer) -> None:
    for source in (NO_SYSTEM, "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}"):
        told = ChatTemplate(source, smollm).render([CALLS[0]], tools=TOOLS)
        assert told.startswith("[user]You may call functions")
        assert told.endswith("\n\nask")


def test_calls_and_results_as_text(smollm: Tokenizer) -> None:
    """The roles still take turns."""
    told = ChatTemplate(PLAIN, smollm).render(normalise_messages(CALLS))
    assert told == (
        '[user]ask[assistant]hm\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x": "é"}}\n</tool_call>'
        "[user]<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\nand?"
    )
    parts = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert ChatTemplate(parts, smollm).render(normalise_messages(CALLS)) == told


def test_a_template_that_knows_calls_but_no_tools(smollm: Tokenizer) -> None:
    source = PLAIN + "{% for call in messages[-1].tool_calls %}{{ call.function.name }}{% endfor %}"
    told = ChatTemplate(source, smollm).render(normalise_messages(CALLS[:2]), tools=TOOLS)
    assert told.endswith("[user]ask[assistant]hmfg")
    assert "<tools>" in told
    assert "<tool_call>" not in told
