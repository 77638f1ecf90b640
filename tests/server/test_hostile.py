"""Bodies meant to hurt: each gets a short error quickly, and nobody else notices."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from octavo.server.fields import MAX_FIELD_BYTES
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
    "n": (b'{"prompt": "a", "n": 1000000}', 400),
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", HOSTILE)
def test_refused_shortly(live: Live, web: httpx.Client, name: str, path: str) -> None:
    body, status = HOSTILE[name]
    begin = time.perf_counter()
    answer = web.post(path, content=body)
    seconds = time.perf_counter() - begin
    assert 400 <= answer.status_code < 500
    if path == "/v1/completions":
        assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 16384
    assert seconds < 2.0, "twice the target: other tests may share the machine"
    assert not live.backend.live


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
    end.set()
    watcher.join()
    assert max(b - a for a, b in pairwise(moments)) < 1.0


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs", "logit_bias"])
def test_only_the_prompt_may_be_large(live: Live, web: httpx.Client, field: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], field: {"1": "x" * MAX_FIELD_BYTES}}
    answer = web.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
