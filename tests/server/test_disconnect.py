"""A client that goes ends its generation at once, whether it streams or not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any

import httpx
import pytest

from octavo.server import create_app
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS, Live


def send_request(live: Live, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=10)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: octavo\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "HANG", "stream": True},
        {"prompt": "HANG", "stream": False},
        {"prompt": ["HANG", "HANG2", "ok"], "stream": True, "n": 2},
        {"prompt": ["HANG", "HANG2", "ok"], "stream": False},
    ],
)
def test_closing_the_connection_aborts(live: Live, body: dict[str, Any]) -> None:
    live.backend.hanging.clear()
    with send_request(live, body):
        assert live.backend.hanging.wait(5)
        assert live.backend.live
        assert not live.backend.idle.is_set()
    assert live.backend.idle.wait(2), live.backend.live


def test_others_are_not_disturbed(live: Live, web: httpx.Client) -> None:
    live.backend.hanging.clear()
    with send_request(live, {"prompt": "HANG", "stream": True}):
        assert live.backend.hanging.wait(5)
        answer = web.post("/v1/completions", json={"prompt": "abc"})
        assert answer.json()["choices"][0]["text"] == "abc"
        assert live.backend.live
    assert live.backend.idle.wait(2)


class Exchange:
    """One request to the app, driven by hand: what was sent, and a switch for the client's going."""

    def __init__(self, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self.body = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [],
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
        }
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("turns", range(14))
@pytest.mark.parametrize("stream", [True, False])
async def test_going_at_any_moment_leaves_nothing(backend: EchoBackend, turns: int, stream: bool) -> None:
    """The client goes after each possible number of turns of the event loop."""
    exchange = Exchange({"prompt": ["abc", "HANG"], "stream": stream})
    before = asyncio.all_tasks()
    app = create_app(backend, SETTINGS)
    task = asyncio.create_task(app(exchange.scope, exchange.receive, exchange.send))
    for _ in range(turns):
        await asyncio.sleep(0)
    exchange.gone.set()
    await asyncio.wait_for(task, 5)
    assert backend.live == set()
    assert app.state.context.running == set()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("after", range(4))
async def test_a_connection_that_closes_before_it_says_so(backend: EchoBackend, after: int) -> None:
    exchange = Exchange({"prompt": "abc", "stream": True})

    async def send(message: Any) -> None:
        if len(exchange.sent) == after:
            raise RuntimeError("the handler is closed")
        await exchange.send(message)

    await create_app(backend, SETTINGS)(exchange.scope, exchange.receive, send)
    assert len(exchange.sent) == after
    assert backend.live == set()


async def test_stopping_the_server_tells_open_requests(backend: EchoBackend) -> None:
    app = create_app(backend, SETTINGS)
    exchanges = [Exchange({"prompt": "HANG", "stream": stream}) for stream in (True, False)]
    tasks = [asyncio.create_task(app(e.scope, e.receive, e.send)) for e in exchanges]
    async with asyncio.timeout(5):
        while len(backend.live) < 2 or not backend.hanging.is_set() or not exchanges[0].sent:
            await asyncio.sleep(0)
    app.state.context.drop_running()
    await asyncio.gather(*tasks)
    streamed, whole = (b"".join(m.get("body", b"") for m in e.sent) for e in exchanges)
    assert b"shutting down" in streamed
    assert streamed.endswith(b"data: [DONE]\n\n")
    assert exchanges[1].sent[0]["status"] == 503
    assert b"shutting down" in whole
    assert backend.live == set()


def test_many_at_once(live: Live, web: httpx.Client) -> None:
    """Mixed clients, a third of whom go: the others get their own text."""
    failures: list[str] = []

    def run(number: int) -> None:
        text = f"text {number} " * 5
        if number % 3 == 0:
            send_request(live, {"prompt": "HANG" + text, "stream": number % 2 == 0, "max_tokens": 500}).close()
            return
        answer = web.post("/v1/completions", json={"prompt": text, "max_tokens": 500})
        if answer.json()["choices"][0]["text"] != text:
            failures.append(answer.text)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert live.backend.idle.wait(5)
