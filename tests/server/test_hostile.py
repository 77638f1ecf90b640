"""Bodies meant to hurt: each gets a short error quickly, and nobody else notices."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from octavo.server.table import MAX_FIELD_BYTES
from tests.server.live import Live

DEEP = b"[" * 10_000 + b"]" * 10_000
MEGABYTES = 10**6

HOSTILE: dict[str, tuple[bytes, int]] = {
    "too large": (b'{"prompt": "' + b"a" * 30 * MEGABYTES + b'"}', 413),
    "deep": (DEEP, 400),
    "deep field": (b'{"prompt": "a", "tools": ' + DEEP + b"}", 400),
    "deep unknown field": (b'{"prompt": "a", "what": ' + DEEP + b"}", 400),
    "deep prompt": (b'{"prompt": ' + DEEP + b"}", 400),
    "deep, open": (b"[" * 1_000_000, 400),
    "many empty lists": (b'{"prompt": [' + b"[]," * 2 * MEGABYTES + b"[]]}", 400),
    "many messages": (b'{"messages": [' + b"{}," * MEGABYTES + b"{}]}", 400),
    "most messages": (b'{"messages": [' + b"{}," * 2_600_000 + b"{}]}", 400),
    "most whole messages": (b'{"messages": [' + b'{"role":""},' * 650_000 + b'{"role":""}]}', 400),
    "many whole messages": (b'{"messages": [' + b'{"role":"user","content":""},' * 250_000 + b"{}]}", 400),
    "many ids": (b'{"prompt": [' + b"1," * 4 * MEGABYTES + b"1]}", 400),
    "many texts": (b'{"prompt": [' + b'"",' * 2 * MEGABYTES + b'""]}', 400),
    "long text": (b'{"prompt": "' + b"a" * 8 * MEGABYTES + b'"}', 400),
    "many fields": (b"{" + b",".join(b'"f%d":1' % i for i in range(600_000)) + b"}", 400),
    "long name": (b'{"' + b"a" * 8 * MEGABYTES + b'": 1}', 400),
    "large field": (b'{"prompt": "a", "stop": "' + b"a" * 2 * MEGABYTES + b'"}', 400),
    "large model": (b'{"prompt": "a", "model": "' + b"a" * MEGABYTES + b'"}', 404),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400),
    "infinity": (b'{"prompt": "a", "temperature": Infinity}', 400),
    "too large a number": (b'{"prompt": "a", "temperature": 1e999}', 400),
    "many digits": (b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}", 400),
    **{
        f"many digits, {name}": (b'{"prompt": "a", "%b": -%b}' % (name.encode(), b"9" * 400), 400)
        for name in ("n", "seed", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
    },
    "n": (b'{"prompt": "a", "n": 1000000}', 400),
    "echoed": (b'{"prompt": "%b", "echo": true, "logprobs": 20, "n": 128}' % (b"a" * 3900), 400),
    "listed": (b'{"prompt": "%b", "prompt_logprobs": 20, "n": 128}' % (b"a" * 3900), 400),
    "surrogate": (b'{"prompt": "\\ud800"}', 400),
    "surrogate name": (b'{"\\ud800": 1}', 400),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "invalid UTF-8 name": (b'{"\xff": 1}', 400),
    "encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', 400),
    "no JSON": (b"prompt=a", 400),
    "empty": (b"", 400),
    "cut": (b'{"prompt": "a"', 400),
    "twice": (b'{"prompt": "a"}{"prompt": "a"}', 400),
    "no object": (b'["prompt"]', 400),
    "null": (b"null", 400),
    "zeros": (b"\0" * 1000, 400),
    "wrong types": (b'{"prompt": "a", "stop": {"a": [1]}}', 400),
}


def nested(depth: int) -> dict[str, Any]:
    """A schema that is itself fine."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def doubled(depth: int) -> dict[str, Any]:
    """A schema of 2 ** depth texts."""
    names = [f"d{i}" for i in range(depth)]
    pairs = pairwise(names)
    levels = {a: {"type": "array", "prefixItems": [{"$ref": f"#/$defs/{b}"}] * 2, "minItems": 2} for a, b in pairs}
    return {"$ref": "#/$defs/d0", "$defs": levels | {names[-1]: {"type": "string"}}}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def called(arguments: str, times: int = 1) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call] * times}


USER = {"role": "user", "content": "a"}
LONG_SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 1000} for i in range(20_000)}}
SCHEMAS: dict[str, Any] = {
    "deep schema": nested(200),
    "long schema": LONG_SCHEMA,
    "long enum": {"enum": [f"value {i}" for i in range(50_000)]},
    "long pattern": {"type": "string", "pattern": "(a?){1000}" * 400},
    "large count": {"type": "string", "minLength": 10**9},
    "not a schema": {"type": ["text"]},
    "not": {"not": {"type": "string"}},
    "no end": {"$ref": "#"},
    "nothing fits": {"type": "string", "enum": [1, 2]},
    "surrogate": {"const": "\ud800"},
    "surrogate name": {"properties": {"\udfff": {}}},
}
OUTPUTS: dict[str, Any] = {
    "none": {},
    "two": {"json_object": True, "regex": "a"},
    "deep text": {"json": "[" * 10_000},
    "deep object": {"json": '{"not":' * 10_000 + "1" + "}" * 10_000},
    "long regex": {"regex": "a" * 500_000},
    "backtracking": {"regex": "(?=a)b"},
    "no grammar": {"grammar": "\x00"},
    "deep grammar": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    "long grammar": {"grammar": "\n".join(f'r{i}: r{i + 1} "a"' for i in range(20_000))},
    "choices": {"choice": [f"choice {i}" for i in range(40_000)]},
    "empty choice": {"choice": []},
    "types": {"choice": [1]},
}


def in_tools(parameters: Any, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


CHATS: dict[str, dict[str, Any]] = {
    **{f"{name}, format": {"response_format": formatted(schema)} for name, schema in SCHEMAS.items()},
    **{f"{name}, tool": {"tools": in_tools(schema), "tool_choice": "required"} for name, schema in SCHEMAS.items()},
    **{f"{name}, outputs": {"structured_outputs": value} for name, value in OUTPUTS.items()},
    "deep, told": {"tools": in_tools(nested(300))},
    "many tools": {"tools": [tool for i in range(10_000) for tool in in_tools({}, f"f{i}")]},
    "many forced tools": {
        "tools": [tool for i in range(900) for tool in in_tools(nested(9), f"f{i}")],
        "tool_choice": "required",
    },
    "tool name": {"tools": in_tools({}, "a" * 100_000)},
    "odd tool name": {"tools": in_tools({}, "\ud800")},
    "doubling": {"response_format": formatted(doubled(40)), "temperature": 101},
    "kwargs": {"chat_template_kwargs": nested(300) | {"messages": 1}},
    "calls": {"messages": [USER, called("[" * 10_000)]},
    "many calls": {"messages": [USER, called("{}", 100_000)]},
    "documents": {"documents": [nested(300)]},
    "choice": {"tool_choice": nested(300)},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 1000}] * 1000}]},
    "n": {"n": 10**6},
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_refused_shortly(live: Live, web: httpx.Client, name: str) -> None:
    refused_shortly(live, web, "/v1/chat/completions", chat_body(name))


def chat_body(name: str) -> bytes:
    return json.dumps({"messages": [USER]} | CHATS[name]).encode()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", HOSTILE)
def test_refused_shortly(live: Live, web: httpx.Client, name: str, path: str) -> None:
    body, status = HOSTILE[name]
    answer = refused_shortly(live, web, path, body)
    if path == "/v1/completions":
        assert answer.status_code == status


def refused_shortly(live: Live, web: httpx.Client, path: str, body: bytes) -> httpx.Response:
    begin = time.perf_counter()
    answer = web.post(path, content=body)
    seconds = time.perf_counter() - begin
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 16384
    assert seconds < 2.0, "twice the target: other tests may share the machine"
    assert not live.backend.live
    return answer


def test_a_body_without_a_length_is_bounded_too(live: Live, web: httpx.Client) -> None:
    chunks = (b"a" * MEGABYTES for _ in range(20))
    answer = web.post("/v1/completions", content=chunks)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_streams_flow_on(live: Live, web: httpx.Client) -> None:
    """The longest gap between events of a stream while all of the above arrive."""
    moments: list[float] = []
    begun, end = threading.Event(), threading.Event()

    def watch() -> None:
        body = {"prompt": "abc", "stream": True, "ignore_eos": True, "max_tokens": 4000}
        while not end.is_set():
            with web.stream("POST", "/v1/completions", json=body) as stream:
                for _ in stream.iter_raw():
                    moments.append(time.perf_counter())
                    begun.set()
                    if end.is_set():
                        break

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert begun.wait(5)
    for body, _ in HOSTILE.values():
        web.post("/v1/completions", content=body)
    for name in CHATS:
        web.post("/v1/chat/completions", content=chat_body(name))
    end.set()
    watcher.join()
    assert max(b - a for a, b in pairwise(moments)) < 1.0


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs", "logit_bias"])
def test_only_the_prompt_may_be_large(live: Live, web: httpx.Client, field: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], field: {"1": "x" * MAX_FIELD_BYTES}}
    answer = web.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
