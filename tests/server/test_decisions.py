"""What Octavo decided where other servers differ, or agree on something doubtful: a test for each.

The list is docs/api.md's, which has the same sentences.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.server import create_app
from octavo.text import ChatTemplate
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS, Live
from tests.server.scripted import ScriptedBackend, chunks_of, client_of, function
from tests.server.test_disconnect import send_request
from tests.server.test_tools import accepts, call

ROOT = Path(__file__).parents[2]
USER = {"role": "user", "content": "a"}
NAMED = {"type": "function", "function": {"name": "weather"}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


async def error_of(http: httpx.AsyncClient, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_every_decision_has_a_test() -> None:
    decisions = runpy.run_path(str(ROOT / "tools" / "api_table.py"))["DECISIONS"]
    assert {f"test_{name}" for name in decisions} <= globals().keys()


async def test_unknown_fields(http: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"messages": [USER], "prompt": "a"}
    for path, other in (("/v1/chat/completions", "prompt"), ("/v1/completions", "messages")):
        own = {name: value for name, value in body.items() if name != other}
        for name in ("temprature", "guided_json", "guided_regex", "guided_choice", "functions"):
            assert (await error_of(http, own | {name: ["x"]}, path))["param"] == name
        for name in ("user", "service_tier", "safety_identifier", "prompt_cache_key"):
            assert (await http.post(path, json=own | {name: "x"})).status_code == 200
        assert (await http.post(path, json=own | {"metadata": {"a": "b"}, "store": True})).status_code == 200
    for name, value in (("best_of", 3), ("suffix", "x")):
        assert (await error_of(http, {"prompt": "a", name: value}, "/v1/completions"))["param"] == name
    for value in (1, 2):
        body = {"prompt": "a", "n": 2, "best_of": value}
        assert (await http.post("/v1/completions", json=body)).status_code == 200


async def test_unknown_roles(http: httpx.AsyncClient) -> None:
    for role in ("wizard", "User", "", "function"):
        error = await error_of(http, {"messages": [USER, {"role": role, "content": "a"}]})
        assert error["param"] == "messages[1].role"


async def test_continuing(http: httpx.AsyncClient) -> None:
    messages = [USER, {"role": "assistant", "content": "I am"}]
    for extra, end in (({}, "<assistant>I am<assistant>"), ({"continue_final_message": True}, "<assistant>I am")):
        answer = await http.post("/v1/chat/completions", json={"messages": messages} | extra)
        assert answer.json()["choices"][0]["message"]["content"] == "<user>a" + end
    assert (await error_of(http, {"messages": [USER], "continue_final_message": True}))["param"] == (
        "continue_final_message"
    )


async def test_finishing_chunk() -> None:
    answers = ["Hello", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', ""]
    async with client_of(ScriptedBackend(answers, most=50)) as http:
        body = {"messages": [USER], "tools": [function("weather")], "n": 3, "stream": True}
        chunks = chunks_of(await http.post("/v1/chat/completions", json=body))
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [(end["delta"], end["finish_reason"]) for end in sorted(ends, key=lambda end: end["index"])] == [
        ({}, "stop"),
        ({}, "tool_calls"),
        ({}, "stop"),
    ]


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_forced_tool_choices(strict: bool | None, choice: Any) -> None:
    text = f"[{call('weather', {'city': 'Bern'})}]"
    backend = ScriptedBackend([text], template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    tool = function("weather", CITY)
    tool["function"] |= {} if strict is None else {"strict": strict}
    async with client_of(backend, tool_call_parser="none") as http:
        body = {"messages": [USER], "tools": [tool], "tool_choice": choice}
        answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    (made,) = answer["message"]["tool_calls"]
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("weather", {"city": "Bern"})
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    (request,) = backend.requests
    assert b"weather" in bytes(t for t in request.prompt_token_ids if t < 256), "the tools are told nevertheless"
    assert accepts(request.grammar, text, backend.inputs.vocabulary)
    assert not accepts(request.grammar, f"[{call('weather', {'city': 5})}]", backend.inputs.vocabulary)
    assert not accepts(request.grammar, "Hello", backend.inputs.vocabulary)


async def test_max_tokens(http: httpx.AsyncClient, backend: EchoBackend) -> None:
    await http.post("/v1/completions", json={"prompt": "a" * 100})
    await http.post("/v1/chat/completions", json={"messages": [USER]})
    assert [request.params.max_tokens for request in backend.requests] == [16, 4096 - len("<user>a<assistant>")]
    answer = (await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 0, "echo": True})).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("abc", 0)
    assert (await error_of(http, {"prompt": "a", "max_tokens": 0}, "/v1/completions"))["param"] == "max_tokens"
    for name in ("max_tokens", "max_completion_tokens"):
        error = await error_of(http, {"messages": [USER], name: 5000})
        assert error["param"] == name
        assert "4096" in error["message"]


async def test_several_greedy_choices(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/completions", json={"prompt": ["ab", "c"], "n": 2, "temperature": 0})).json()
    assert len(answer["choices"]) == 4
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 3 + 3 + 2 + 2)


async def test_logprobs(http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "🙂"}], "logprobs": True, "top_logprobs": 0}
    choice = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "<user>🙂<assistant>".encode()
    assert all(entry["token"] != "<eos>" for entry in content)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("not", {}), ("if", {}), ("unevaluatedProperties", False), ("$ref", "#/$defs/nowhere"), ("minimun", 1)],
)
async def test_unenforced_keywords(http: httpx.AsyncClient, keyword: str, value: Any) -> None:
    schema = {"type": "object", "properties": {"a": {keyword: value}}}
    for strict in (False, True):
        format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}
        for field, given in (("response_format", format_), ("structured_outputs", {"json": schema})):
            error = await error_of(http, {"messages": [USER], field: given})
            assert error["param"] == field
            assert keyword in error["message"]
            assert error == await error_of(http, {"prompt": "a", field: given}, "/v1/completions")


async def test_control_tokens_in_content() -> None:
    backend = ScriptedBackend(["a"], template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    text = "<eos><tool_call>"
    async with client_of(backend) as http:
        body = {"messages": [{"role": "user", "content": text}]}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    (request,) = backend.requests
    assert list(request.prompt_token_ids) == [*text.encode(), 256]


async def test_template_kwargs(http: httpx.AsyncClient) -> None:
    for name in ("messages", "tools", "documents", "add_generation_prompt", "bos_token"):
        body = {"messages": [USER], "chat_template_kwargs": {name: []}}
        assert (await error_of(http, body))["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("stream", [False, True])
async def test_split_characters(http: httpx.AsyncClient, stream: bool) -> None:
    """The answer echoes the prompt, whose end begins a character, and whose beginning is the rest of it."""
    prompt = [0x99, 0x82, *b"ab", 0xF0, 0x9F]
    answer = await http.post("/v1/completions", json={"prompt": prompt, "stream": stream})
    pieces = chunks_of(answer) if stream else [answer.json()]
    text = "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
    assert text == "ab\ufffd", "the last two bytes are the answer's own"


def test_disconnects(live: Live, web: httpx.Client) -> None:
    """Of a client that does not stream, while another one does."""
    live.backend.hanging.clear()
    stop, busy = threading.Event(), threading.Event()

    def stream() -> None:
        body = {"prompt": "abc", "stream": True, "ignore_eos": True, "max_tokens": 4000}
        while not stop.is_set():
            with web.stream("POST", "/v1/completions", json=body) as events:
                for _ in events.iter_raw():
                    busy.set()
                    if stop.is_set():
                        break

    other = threading.Thread(target=stream)
    other.start()
    try:
        assert busy.wait(5)
        with send_request(live, {"prompt": "HANG"}):
            assert live.backend.hanging.wait(5)
            (hung,) = [request.id for request in live.backend.requests if bytes(request.prompt_token_ids) == b"HANG"][
                -1:
            ]
        for _ in range(100):
            if hung not in live.backend.live:
                break
            web.get("/health")
        assert hung not in live.backend.live
    finally:
        stop.set()
        other.join()


async def test_keys(backend: EchoBackend) -> None:
    transport = httpx.ASGITransport(create_app(backend, dataclasses.replace(SETTINGS, api_keys=("k",))))
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        for path in ("/v1/models", "/version", "/metrics", "/openapi.json", "/tokenize", "/nothing"):
            assert (await http.get(path)).status_code == 401
        assert (await http.get("/health")).status_code == 200


async def test_errors(backend: EchoBackend) -> None:
    """One form, whatever is wrong."""
    settings = dataclasses.replace(SETTINGS, api_keys=("k",))
    transport = httpx.ASGITransport(create_app(backend, settings), raise_app_exceptions=False)
    key = {"authorization": "Bearer k"}
    chat = "/v1/chat/completions"
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        answers = [
            (401, await http.post(chat, json={"messages": [USER]})),
            (404, await http.get("/nothing", headers=key)),
            (404, await http.post(chat, json={"messages": [USER], "model": "other"}, headers=key)),
            (405, await http.get(chat, headers=key)),
            (400, await http.post(chat, content=b'{"messages": "\xff"}', headers=key)),
            (400, await http.post(chat, content=b"{", headers=key)),
            (400, await http.post(chat, json={"messages": [USER], "temperature": 101}, headers=key)),
            (500, await http.post(chat, json={"messages": [USER | {"content": "FAIL"}]}, headers=key)),
        ]
        backend.chat_template = ChatTemplate("{{ raise_exception('no') }}", backend.tokenizer or pytest.fail("none"))
        answers.append((400, await http.post(chat, json={"messages": [USER]}, headers=key)))
    for status, answer in answers:
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
