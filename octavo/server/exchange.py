"""One HTTP exchange: reading a bounded body, working while the client is there, streaming events.

Knows nothing of what is asked or answered. The client's going is watched while the work runs, streamed or not:

    receive() ── body ── body end ───────────────── http.disconnect ──> work is cancelled
    work                     └── prepare ── generate ── send ── ...
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.core.errors import EngineDead
from octavo.server.errors import HTTPError, encode_error, http_error
from octavo.server.wire import SSE_DONE, sse

INLINE_BYTES = 2048
"""Bodies up to this size are parsed, rendered and tokenized on the event loop (about 1 ms), others in a thread."""

_COSTLY = re.compile(
    rb'"(?:tools|functions|documents|chat_template|structured_outputs|response_format|guided_\w+)"|\\u', re.ASCII
)
"""What makes a small body slow: programs, schemas and grammars of the client's. An escaped letter may spell a key."""

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises HTTPError 413 beyond `limit` bytes, ClientDisconnect when the client goes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> HTTPError:
    return HTTPError(413, f"the body is larger than {limit} bytes: send less at once", code="request_too_large")


async def offload(work: Callable[[bytes], T], body: bytes) -> T:
    """`work(body)`, in a thread when the body is large or asks for what may take long."""
    if len(body) <= INLINE_BYTES and not _COSTLY.search(body):
        return work(body)
    return await asyncio.to_thread(work, body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], running: set[asyncio.Task[Any]]) -> T:
    """Runs `work` to its end, a member of `running` meanwhile; the request's body must have been read.

    When the client disconnects, `work` is cancelled, has cleaned up and ClientDisconnect is raised. When somebody
    else cancels the task in `running`, EngineDead is raised.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    running.add(task)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        if task.cancelled():
            raise EngineDead("the server is shutting down")
        return task.result()
    finally:
        running.discard(task)
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends the server-sent event `first`, then `events` as they come, then [DONE].

    `events` must have been started, so that closing it, which happens however the exchange ends, cleans up.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes], running: set[asyncio.Task[Any]]) -> None:
        self.status_code = 200
        self.background = None
        self.first = first
        self.events = events
        self.running = running
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A client's going is no error. uvloop tells of it by a RuntimeError where it has not told otherwise yet."""
        with suppress(ClientDisconnect, RuntimeError):
            await self._send(receive, send)

    async def _send(self, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._pump(send), self.running)
        except EngineDead as error:
            await send({"type": "http.response.body", "body": error_event(error), "more_body": True})
        finally:
            await self.events.aclose()
        await send({"type": "http.response.body", "body": SSE_DONE})

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})


def error_event(error: BaseException) -> bytes:
    """The event that tells a client of an error after its stream has begun."""
    return sse(encode_error(http_error(error)))
