"""The engine process as the frontend sees it: starting it, messages both ways, its end.

    frontend                                   engine (python -m octavo.engine INBOX OUTBOX)
    bind INBOX, OUTBOX; spawn     ------->     import torch
    resolve the configuration
    stdin: length, EngineConfig   ------->     load      ---- Progress ... Ready --->
    Add, Finish, ResetPrefixCache ------->     step      ---- Outputs, Reply ------->
    Shutdown, or EOF of stdin     ------->     exit      ---- Died, if it fails ---->

Both sockets are unix sockets in a private directory that goes away with the client. The engine runs in a session of
its own, so Ctrl-C reaches the frontend alone; stdin stays open as long as the parent lives. Owns no request state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence

import msgspec
import zmq
import zmq.asyncio

from octavo.config.engine import EngineConfig
from octavo.core.errors import EngineDead
from octavo.core.request import Add, Finish, FromEngine, Request, Shutdown, ToEngine

SHORT_SPINS = {"GOMP_SPINCOUNT": "20000"}
"""OpenMP's threads give up their core soon when they wait for one that does not run. Beside a busy thread of this
process on 2 cores, four streams had gaps of 104 to 444 ms with libgomp's own count, of 187 to 197 ms with this one."""
ENGINE_COMMAND = (sys.executable, "-m", "octavo.engine")
GRACE_SECONDS = 5.0
"""How long the engine may take to leave after Shutdown, and again after SIGTERM, before SIGKILL."""
LAST_WORDS_SECONDS = 0.4
"""How long an exited engine's last message may be on its way."""
LAST_WORDS_TURNS = 20

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode


class EngineClient:
    """A running engine process. `await EngineClient.spawn()`, then `configure`, `receive` and `send`; at last `close`.

    Every method belongs to the event loop's thread.
    """

    _process: asyncio.subprocess.Process
    _exit: asyncio.Task[int]

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="octavo-", ignore_cleanup_errors=True)
        self._context = zmq.asyncio.Context()
        self._outbox: zmq.asyncio.Socket = self._context.socket(zmq.PULL)
        self._inbox: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
        self._endpoints = [f"ipc://{self._directory.name}/{name}" for name in ("in", "out")]
        self._inbox.bind(self._endpoints[0])
        self._outbox.bind(self._endpoints[1])
        self._adds: list[Request] = []
        self._finishes: list[tuple[str, int]] = []
        self._flush_due = False
        self._closed = False

    @classmethod
    async def spawn(cls, command: Sequence[str] = ENGINE_COMMAND) -> EngineClient:
        """Starts the process, which imports what it needs while the caller resolves its configuration."""
        client = cls()
        try:
            client._process = await asyncio.create_subprocess_exec(
                *command,
                *client._endpoints,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
                env=SHORT_SPINS | os.environ,
            )
        except BaseException:
            client._release()
            raise
        client._exit = asyncio.ensure_future(client._process.wait())
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    async def configure(self, config: EngineConfig) -> None:
        """Sends the configuration. An engine that has died meanwhile is noticed by `receive`."""
        assert self._process.stdin is not None
        frame = _encode(config)
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(struct.pack("<I", len(frame)) + frame)
            await self._process.stdin.drain()

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
        receiving = asyncio.ensure_future(self._outbox.recv())
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
        raise EngineDead(f"the engine process {self._describe_exit()}")

    def _describe_exit(self) -> str:
        code = self._process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

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
            if not self._exit.done():  # cancelled
                self._process.kill()
            self._release()

    async def _end(self, grace: float) -> None:
        assert self._process.stdin is not None
        for seconds, end in ((grace, self._process.terminate), (GRACE_SECONDS, self._process.kill)):
            await asyncio.wait([self._exit], timeout=seconds)
            if not self._exit.done():
                end()
        await self._exit
        self._process.stdin.close()
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.wait_closed()

    def _release(self) -> None:
        self._closed = True
        self._inbox.close(0)
        self._outbox.close(0)
        self._context.term()
        self._directory.cleanup()
