"""Tools of a request, and the grammar that holds a model to a required or named choice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.core.errors import InvalidRequest
from octavo.core.params import StructuredOutputs
from octavo.server.fields import ChatRequest
from octavo.server.table import parse
from octavo.server.tools import Tools, request_tools
from octavo.structured import Vocabulary, compile_grammar
from octavo.structured.grammar import new_matcher
from tests.frontend.tiny import EOS, VOCAB, byte_tokenizer
from tests.server.scripted import ScriptedBackend, client_of, function

VOCABULARY = Vocabulary(byte_tokenizer(), VOCAB, (EOS,))
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NESTED = {
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    "properties": {"at": {"$ref": "#/$defs/Point"}},
    "required": ["at"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "required": []}},
}


def tools_of(**body: Any) -> Tools | None:
    return request_tools(parse(ChatRequest, json.dumps({"messages": [], **body}).encode()))


def accepts(grammar: str, text: str, vocabulary: Vocabulary | None = VOCABULARY) -> bool:
    """The whole `text`, and that it may end there."""
    assert vocabulary is not None
    tokens = [*vocabulary.tokenizer.encode(text), EOS]
    return int(new_matcher(grammar, vocabulary).validate_tokens(tokens)) == len(tokens)


def grammar_of(**body: Any) -> str:
    tools = tools_of(**body)
    assert tools is not None
    tools.check()
    return compile_grammar(StructuredOutputs(json=tools.schema()), VOCABULARY)


def call(name: str, parameters: Any) -> str:
    return json.dumps({"name": name, "parameters": parameters})


def test_a_required_choice_calls_what_there_is() -> None:
    grammar = grammar_of(tools=[function("weather", CITY), function("now")], tool_choice="required")
    assert accepts(grammar, f"[{call('weather', {'city': 'Bern'})}]")
    assert accepts(grammar, f"[{call('now', {})}, {call('weather', {'city': ''})}]")
    for wrong in ("[]", f"[{call('now', 1)}]", f"[{call('weather', {})}]", f"[{call('then', {})}]", "{}"):
        assert not accepts(grammar, wrong), wrong


@pytest.mark.parametrize("extra", [{"parallel_tool_calls": False}, {"tool_choice": None}])
def test_a_single_call(extra: dict[str, Any]) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    body = {"tools": [function("weather", CITY), function("now")], "tool_choice": "required"} | extra
    body["tool_choice"] = body["tool_choice"] or named
    grammar = grammar_of(**body)
    assert accepts(grammar, f"[{call('now', {})}]")
    assert not accepts(grammar, f"[{call('now', {})}, {call('now', {})}]")
    assert accepts(grammar, f"[{call('weather', {'city': 'Bern'})}]") is ("parallel_tool_calls" in extra)


def test_references_within_parameters() -> None:
    grammar = grammar_of(tools=[function("a", NESTED), function("b", TREE)], tool_choice="required")
    assert accepts(grammar, f"[{call('a', {'at': {'x': 3}})}]")
    assert not accepts(grammar, f"[{call('a', {'at': {'x': 'three'}})}]")
    assert accepts(grammar, f"[{call('b', {'next': {'next': {}}})}]")
    assert not accepts(grammar, f"[{call('b', {'next': 4})}]")


def test_data_that_looks_like_a_reference_stays() -> None:
    parameters = {"type": "object", "properties": {"a": {"const": {"$ref": "#/x"}}}, "required": ["a"]}
    grammar = grammar_of(tools=[function("f", parameters)], tool_choice="required")
    assert accepts(grammar, f"[{call('f', {'a': {'$ref': '#/x'}})}]")


def test_a_function_without_parameters_takes_none() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    grammar = grammar_of(tools=[tool], tool_choice="required")
    assert accepts(grammar, f"[{call('f', {})}]")
    assert not accepts(grammar, f"[{call('f', {'a': 1})}]")


def test_allowed_tools_are_the_ones_told() -> None:
    named = {"type": "function", "function": {"name": "b"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    tools = tools_of(tools=[function("a"), function("b")], tool_choice=choice)
    assert tools is not None
    assert [tool["function"]["name"] for tool in tools.told] == ["b"]
    assert (tools.choice, tools.constrained, tools.single) == ("auto", False, False)


@pytest.mark.parametrize(
    "body", [{}, {"tools": []}, {"tool_choice": "none"}, {"tools": [function("a")], "tool_choice": "none"}]
)
def test_no_tools(body: dict[str, Any]) -> None:
    assert tools_of(**body) is None


def test_what_the_template_is_told() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "strict": True}}
    tools = tools_of(tools=[tool])
    assert tools is not None
    (told,) = tools.told
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert told == {"type": "function", "function": {"name": "f", "description": "d", "parameters": nothing}}


NAMED = {"type": "function", "function": {"name": "a"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": "some", "tools": [function("a")]}, "tool_choice"),
        ({"tool_choice": 1, "tools": [function("a")]}, "tool_choice"),
        ({"tool_choice": {}, "tools": [function("a")]}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": [function("a")]}, "tool_choice.function"),
        ({"tool_choice": NAMED | {"x": 1}, "tools": [function("a")]}, "tool_choice.x"),
        ({"tool_choice": NAMED, "tools": [function("b")]}, "tool_choice.function.name"),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
                "tools": [function("b")],
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
                "tools": [function("b")],
            },
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [function("")]}, "tools[0].function.name"),
        ({"tools": [function("a b")]}, "tools[0].function.name"),
        ({"tools": [function("a\n")]}, "tools[0].function.name"),
        ({"tools": [function("a" * 65)]}, "tools[0].function.name"),
        ({"tools": [function("a"), function("a")]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "tools[0].function.x"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [function("a", {"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function("a")] * 2000}, "tools"),
        ({"tools": [function("a")], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_refused_with_the_parameter(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tools_of(**body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([function("a"), function("b", {"not": {}})], "tools[1].function.parameters"),
        ([function("a", {"properties": {"x": {"$ref": "#/$defs/y"}}})], "tools[0].function.parameters"),
        ([function("a", {"properties": {"x": {"type": "text"}}})], "tools[0].function.parameters"),
        ([function("a", {"properties": {"x": {"pattern": "("}}})], "tools[0].function.parameters"),
    ],
)
async def test_a_schema_that_cannot_be_enforced_names_the_tool(tools: list[dict[str, Any]], param: str) -> None:
    """When it is to be enforced: with "auto" the model is free."""
    async with client_of(ScriptedBackend(["a"])) as http:
        body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        answer = await http.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["message"].startswith(param)


@pytest.mark.parametrize("field", ["response_format", "structured_outputs"])
async def test_one_constraint_at_a_time(field: str) -> None:
    value = {"response_format": {"type": "json_object"}, "structured_outputs": {"json_object": True}}[field]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [function("a")], field: value}
    async with client_of(ScriptedBackend(["{}"])) as http:
        for choice in ("required", NAMED):
            answer = await http.post("/v1/chat/completions", json=body | {"tool_choice": choice})
            assert answer.json()["error"]["param"] == field
        answer = await http.post("/v1/chat/completions", json=body | {"tool_choice": "none"})
        assert answer.status_code == 200


async def test_a_free_choice_is_between_a_call_and_what_is_constrained() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [function("a")]}
    backend = ScriptedBackend(["{}"])
    async with client_of(backend) as http:
        answer = await http.post("/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}})
    assert answer.json()["choices"][0]["message"]["content"] == "{}"
    (request,) = backend.requests
    made = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    for text in ("{}", made, "<think>hm</think>{}", f"<think>hm</think>{made}"):
        assert accepts(request.grammar, text, backend.inputs.vocabulary), text
    for text in ("a", f"{{}}{made}", "<think>hm</think>"):
        assert not accepts(request.grammar, text, backend.inputs.vocabulary), text
