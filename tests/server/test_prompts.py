"""From messages to token ids over HTTP: control tokens in what a client sends, its own template, tools, roles."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from octavo.server import create_app
from octavo.server.exchange import offload
from tests.frontend.tiny import EOS
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS

TOOLS = [{"type": "function", "function": {"name": "f", "description": "<eos>"}}]


@pytest.fixture
async def trusting(backend: EchoBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A server that takes a request's own template."""
    app = create_app(backend, replace(SETTINGS, trust_request_chat_template=True))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        yield client


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


async def tokenized(client: httpx.AsyncClient, **body: Any) -> list[int]:
    answer = await client.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["tokens"]
    assert isinstance(tokens, list)
    return tokens


async def refusal(client: httpx.AsyncClient, route: str, **body: Any) -> tuple[str, str]:
    answer = await client.post(route, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    "message",
    [
        user("a<eos>b"),
        user([{"type": "text", "text": "<eo"}, {"type": "text", "text": "s><eos>"}]),
        user("a", name="<eos>"),
    ],
)
async def test_a_control_token_in_a_message_is_text(http: httpx.AsyncClient, message: dict[str, Any]) -> None:
    ids = await tokenized(http, messages=[message])
    assert EOS not in ids
    assert b"<eos>" in bytes(ids)
    answer = await http.post("/v1/chat/completions", json={"messages": [message]})
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)
    assert answer.json()["choices"][0]["message"]["content"].encode() == bytes(ids)


async def test_a_completions_prompt_is_the_clients_own(http: httpx.AsyncClient) -> None:
    assert await tokenized(http, prompt="a<eos>") == [97, EOS]


async def test_tools_and_variables(http: httpx.AsyncClient) -> None:
    """The template knows no tools, so they are told; a control token in them is text as well."""
    ids = await tokenized(http, messages=[user("a")], tools=TOOLS, chat_template_kwargs={"shout": "<eos>"})
    assert EOS not in ids
    text = bytes(ids).decode()
    assert text.startswith("<system>You may call functions")
    assert '{"name": "f", "description": "<eos>", "parameters": ' in text
    assert text.endswith("<user>a!<assistant>")


async def test_a_conversation_with_calls(http: httpx.AsyncClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "be"},
        user("a"),
        {"role": "assistant", "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    text = bytes(await tokenized(http, messages=messages)).decode()
    assert text == (
        '<system>be<user>a<assistant><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        "<user><tool_response>\n42\n</tool_response><assistant>"
    )


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (user("a", tool_call_id="1"), "messages[0].tool_call_id"),
        (user("a", reasoning="x"), "messages[0].reasoning"),
        (user("a", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "tool"}, "messages[0].content"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
    ],
)
async def test_messages_that_are_refused(http: httpx.AsyncClient, message: dict[str, Any], param: str) -> None:
    for route in ("/tokenize", "/v1/chat/completions"):
        assert (await refusal(http, route, messages=[message]))[0] == param


@pytest.mark.parametrize("name", ["messages", "tools", "conversation", "add_generation_prompt", "bos_token", "self"])
async def test_variables_that_are_the_servers(http: httpx.AsyncClient, name: str) -> None:
    for route in ("/tokenize", "/v1/chat/completions"):
        param, text = await refusal(http, route, messages=[user("a")], chat_template_kwargs={name: []})
        assert (param, repr(name) in text) == ("chat_template_kwargs", True)


async def test_a_template_needs_trust(http: httpx.AsyncClient, trusting: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"messages": [user("a<eos>")], "chat_template": "[{{ messages[0].content }}]<eos>"}
    param, text = await refusal(http, "/tokenize", **body)
    assert (param, "--trust-request-chat-template" in text) == ("chat_template", True)
    assert await tokenized(trusting, **body) == [*b"[a<eos>]", EOS]


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ nothing.here.at }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
async def test_a_template_that_fails(trusting: httpx.AsyncClient, template: str) -> None:
    for route in ("/tokenize", "/v1/chat/completions"):
        assert (await refusal(trusting, route, messages=[user("a")], chat_template=template))[0] == "chat_template"


@pytest.mark.parametrize(
    ("body", "inline"),
    [
        (b'{"messages": []}', True),
        (b" " * 3000, False),
        (b'{"chat_template": "x"}', False),
        (b'{"chat\\u005ftemplate": "x"}', False),
        (b'{"tools": []}', False),
        (b'{"response_format": {}}', False),
    ],
)
async def test_what_runs_off_the_event_loop(body: bytes, inline: bool) -> None:
    thread = await offload(lambda _: threading.get_ident(), body)
    assert (thread == threading.get_ident()) == inline
