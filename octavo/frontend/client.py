"""The engine process as the frontend sees it: messages both ways, its end.

    frontend                                   engine (python -m octavo.engine INBOX OUTBOX)
    start it (launch)             ------->     import torch
    stdin: length, EngineConfig   ------->
    bind INBOX, OUTBOX                         load      ---- Progress ... Ready --->
    Add, Finish, ResetPrefixCache ------->     step      ---- Outputs, Reply ------->
    Shutdown, or EOF of stdin     ------->     exit      ---- Died, if it fails ---->

`launch` starts the process. Owns no request state.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from octavo.core.errors import EngineDead
from octavo.core.request import Add, Finish, FromEngine, Request, Shutdown, ToEngine
from octavo.frontend.launch import EngineProcess

GRACE_SECONDS = 5.0
"""How long the engine may take to leave after Shutdown, and again after SIGTERM, before SIGKILL."""
LAST_WORDS_SECONDS = 0.4
"""How long an exited engine's last message may be on its way."""
LAST_WORDS_TURNS = 20

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode


class EngineClient:
    """A running engine process, the client's from now on: `receive` and `send`, at last `close`.

    Every method belongs to the event loop's thread.
    """

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._exit: asyncio.Future[Any] = _exit_of(process)
        self._context = zmq.asyncio.Context()
        self._outbox: zmq.asyncio.Socket = self._context.socket(zmq.PULL)
        self._inbox: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        for socket, endpoint in ((self._inbox, process.inbox), (self._outbox, process.outbox)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        self._adds: list[Request] = []
        self._finishes: list[tuple[str, int]] = []
        self._flush_due = False
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def add(self, request: Request) -> None:
        """Queues `request`; those of one turn of the event loop travel together."""
        self._adds.append(request)
        self._schedule_flush()

    def finish(self, sequences: Sequence[tuple[str, int]]) -> None:
        """Queues the end of (request id, index) pairs, index -1 for all of a request; sent after pending adds."""
        self._finishes += sequences
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        adds, finishes = self._adds, self._finishes
        self._adds, self._finishes, self._flush_due = [], [], False
        if adds:
            self.send(Add(adds))
        if finishes:
            self.send(Finish(finishes))

    def send(self, message: ToEngine) -> None:
        """Sends without waiting. Without an engine on the other side the message is dropped: `receive` will tell."""
        if not self._closed:
            with contextlib.suppress(zmq.Again):
                self._inbox.send(_encode(message), zmq.NOBLOCK)

    async def receive(self) -> FromEngine:
        """The next message. Raises EngineDead when the process has ended and all it said has been received."""
        receiving: asyncio.Future[bytes] = asyncio.ensure_future(self._outbox.recv())
        try:
            if not receiving.done():
                await asyncio.wait([receiving, self._exit], return_when=asyncio.FIRST_COMPLETED)
            for _ in range(LAST_WORDS_TURNS):  # in turns, so that a pause of this process does not use up all of it
                if not receiving.done():
                    await asyncio.wait([receiving], timeout=LAST_WORDS_SECONDS / LAST_WORDS_TURNS)
            if receiving.done():
                return _decode(receiving.result())
        finally:
            receiving.cancel()
        raise EngineDead(f"the engine process {self._process.describe_end()}")

    async def close(self, grace: float | None = None) -> None:
        """Ends the process and removes the sockets. Safe to call twice.

        The engine has `grace` seconds (by default GRACE_SECONDS) to leave by itself; while it loads it does not listen.
        """
        if self._closed:
            return
        self._flush()
        self.send(Shutdown())
        self._closed = True
        try:
            await self._end(GRACE_SECONDS if grace is None else grace)
        finally:
            self._release()

    async def _end(self, grace: float) -> None:
        for seconds, end in ((grace, self._process.terminate), (GRACE_SECONDS, self._process.kill)):
            await asyncio.wait([self._exit], timeout=seconds)
            if not self._exit.done():
                end()
        await self._exit

    def _release(self) -> None:
        self._closed = True
        self._inbox.close(0)
        self._outbox.close(0)
        self._context.term()
        self._process.close()


def _exit_of(process: EngineProcess) -> asyncio.Future[None]:
    """Is done when the process has ended."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ended.done():
            ended.set_result(None)

    def watch() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has gone
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=watch, name="octavo-engine-exit", daemon=True).start()
    return ended
