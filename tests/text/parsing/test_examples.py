"""Outputs as models write them, at the edges of the formats, and the choice of a format."""

from __future__ import annotations

import pytest

from octavo.core.errors import InvalidRequest
from octavo.text.parsing import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    Arguments,
    Content,
    Event,
    Formats,
    Reasoning,
    ToolCall,
    detect,
    markers,
    starts_in_reasoning,
)
from tests.text.parsing.outputs import parse


def call(name: str, arguments: str, index: int = 0) -> list[Event]:
    return [ToolCall(index, name), Arguments(index, arguments)]


WHOLE: list[tuple[str, str, list[Event]]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "}{"}}\n</tool_call>', call("f", '{"a": "}{"}')),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', call("f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', [Content('<tool_call>{"arguments": {}}</tool_call>')]),
    ("hermes", "a <tool_call> b", [Content("a <tool_call> b")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru', call("f", '{"a": tru')),
    ("hermes", '<tool_call>{"na', [Content('<tool_call>{"na')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": <b>', [*call("f", '{"a": '), Content("<b>")]),
    ("qwen", 'Hi\n\n<tool_call>{"name": "f"}</tool_call>\n', [Content("Hi"), *call("f", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    ("llama3_json", '{"name": "Bob", "age": 5}', [Content('{"name": "Bob", "age": 5}')]),
    ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', call("other", "{}")),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}]', call("f", "{}")),
    ("mistral", 'x[TOOL_CALLS]f{"a": 1}', [Content("x"), *call("f", '{"a": 1}')]),
    ("granite", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', call("f", '{"a": 1}')),
    ("pythonic", "[f()]", call("f", "{}")),
    ("pythonic", "[f(a='\\x41\\n\\'', b=(1, -2,), c={1: None})]", call("f", '{"a": "\\u0041\\n\'", "b": [1, -2], "c": {"1": null}}')),  # noqa: E501
    ("pythonic", "[1, 2]", [Content("[1, 2]")]),
    ("pythonic", "[f(1)]", [Content("[f(1)]")]),
    ("pythonic", "[f(text='ab", call("f", '{"text": "ab')),
    ("qwen3_coder", "<function=f>\n<parameter=text>\n<a>\n\n</parameter>\n</function>", call("f", '{"text": "<a>\\n"}')),  # noqa: E501
    ("qwen3_coder", "<function=f><parameter=count>x1</parameter></function>", call("f", '{"count": "x1"}')),
    ("qwen3_coder", "<function=f><parameter=on>True</parameter></function>", call("f", '{"on": true}')),
    ("qwen3_coder", "<function=f>\n<parameter=text>\nab", call("f", '{"text": "ab')),
    ("qwen3_coder", "x <function=f", [Content("x <function=f")]),
    ("glm45", "<tool_call>f</tool_call>", call("f", "{}")),
    ("glm45", "use <tool_call> tags", [Content("use <tool_call> tags")]),
    ("openai", "<|channel|>final<|message|>Hi<|return|>", [Content("Hi")]),
    ("openai", " to=functions.f<|channel|>commentary json<|message|>{}<|call|>", call("f", "{}")),
    ("openai", "<|channel|>commentary to=functions.f<|message|><|call|>", call("f", "{}")),
    ("openai", "<|channel|>commentary<|message|>I will look.<|end|>", [Content("I will look.")]),
    ("openai", "plain", [Content("plain")]),
    ("openai", "<|channel|>comm", [Content("<|channel|>comm")]),
    ("glm45", "<tool_call>f<arg_key>ab", [ToolCall(0, "f"), Content("<arg_key>ab")]),
    ("glm45", "<tool_call>f<arg_key>ab</tool_call> c", [ToolCall(0, "f"), Content("<arg_key>ab</tool_call> c")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_c', [*call("f", "{}"), Content("</tool_c")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call> x', [*call("f", '{"a": [1}}'), Content("</tool_call> x")]),  # noqa: E501
    ("pythonic", "[f(text='a\\x4", call("f", '{"text": "a\\\\x4')),
    ("pythonic", "[f(text='\\q\\\\\\U0001F600\\\n')]", call("f", '{"text": "\\\\q\\\\\\ud83d\\ude00"}')),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "events"), WHOLE)
def test_tools(name: str, text: str, events: list[Event]) -> None:
    assert parse(Formats(name), text) == events
    assert parse(Formats(name), text, list(text)) == events


THINKING: list[tuple[str, bool, str, list[Event]]] = [
    ("qwen3", False, "<think>\na\n</think>\n\nb", [Reasoning("a"), Content("b")]),
    ("qwen3", False, "<think>\n\n</think>\n\nb", [Content("b")]),
    ("qwen3", False, "no </think> here <think>", [Content("no </think> here <think>")]),
    ("qwen3", True, "a </think b</think>c</think>", [Reasoning("a </think b"), Content("c</think>")]),
    ("deepseek_r1", True, "<think>a</think>b", [Reasoning("a"), Content("b")]),
    ("deepseek_r1", True, "a</thi", [Reasoning("a</thi")]),
    ("deepseek_r1", True, "</think>", []),
    ("qwen3", False, "<thi", [Content("<thi")]),
    ("mistral", False, "[THINK]a[/THINK]b", [Reasoning("a"), Content("b")]),
    ("openai_gptoss", False, "<|channel|>analysis<|message|>a<|end|>", [Reasoning("a")]),
    ("openai_gptoss", True, "a<|end|><|start|>assistant<|channel|>final<|message|>b", [Reasoning("a"), Content("b")]),
]


@pytest.mark.parametrize(("name", "inside", "text", "events"), THINKING)
def test_reasoning(name: str, inside: bool, text: str, events: list[Event]) -> None:
    formats = Formats(reasoning=name)
    assert parse(formats, text, in_reasoning=inside) == events
    for size in (1, 2, 3, 5):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert parse(formats, text, pieces, in_reasoning=inside) == events


@pytest.mark.parametrize(
    ("name", "tail", "inside"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "what is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\nso far", True),
        ("deepseek_r1", "hi<｜Assistant｜>", True),
        ("deepseek_r1", "hi<｜Assistant｜></think>", False),
        ("mistral", "hi[/INST]", False),
        ("openai_gptoss", "<|start|>assistant", False),
        ("openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>so far", True),
        ("openai_gptoss", "<|channel|>analysis<|message|>x<|end|><|start|>assistant", False),
    ],
)
def test_starts_in_reasoning(name: str, tail: str, inside: bool) -> None:
    assert starts_in_reasoning(Formats(reasoning=name), tail) is inside


@pytest.mark.parametrize(
    ("template", "tokens", "formats"),
    [
        ('<tool_call>\n{"name": ...}</tool_call> <think>', [], Formats("hermes", "qwen3")),
        ("<tool_call>\n<function=x>\n<parameter=y>", [], Formats("qwen3_coder")),
        ("<tool_call>{name}<arg_key>k</arg_key><arg_value></think>", [], Formats("glm45", "qwen3")),
        ("<｜Assistant｜><｜tool▁sep｜></think>", [], Formats("deepseek_v3", "deepseek_r1")),
        ("<|start|><|channel|>analysis<|message|>", [], Formats("openai", "openai_gptoss")),
        ("[INST]", ["[TOOL_CALLS]", "[THINK]", "[/THINK]"], Formats("mistral", "mistral")),
        ("<|start_header_id|> {\"name\": .., \"parameters\": ..}", ["<|python_tag|>"], Formats("llama3_json")),
        ("plain", ["<s>"], Formats()),
    ],
)  # fmt: skip
def test_detect(template: str, tokens: list[str], formats: Formats) -> None:
    assert detect(template, tokens) == formats


def test_names() -> None:
    for name, form in TOOL_FORMATS.items():
        assert markers(Formats(tool=name)) == set(form.markers)
    assert markers(Formats("hermes", "qwen3")) == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert {
        "hermes",
        "llama3_json",
        "mistral",
        "pythonic",
        "deepseek_v3",
        "deepseek_v31",
        "openai",
    } <= TOOL_FORMATS.keys()
    assert {"deepseek_r1", "qwen3", "openai_gptoss", "mistral"} <= REASONING_FORMATS.keys()
    with pytest.raises(InvalidRequest, match="no tool call parser 'x'"):
        markers(Formats(tool="x"))
