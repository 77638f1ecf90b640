"""From a bound port to a served app and back. Owns signals and the order of start and end.

bind (`listen`: a busy port shows at once) -> start the backend (seconds) -> accept -> on_ready
SIGINT/SIGTERM -> no new connections -> open requests finish, after the grace they end -> backend.shutdown
the engine dies -> its requests are told -> the same end, and EngineDead
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import uvicorn

from octavo.core.errors import EngineDead
from octavo.server.app import create_app
from octavo.server.backend import Backend, ServerSettings
from octavo.server.context import Context
from octavo.server.listen import url_of
from octavo.server.protocol import Protocol

T = TypeVar("T")

_KEEP_ALIVE_SECONDS = 75
_FLUSH_SECONDS = 1.0
"""For clients to read the last words of a stream."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SWITCH_SECONDS = 0.001
"""After which a thread that prepares a request lets the event loop go on, so that streams flow meanwhile."""


def serve(
    sock: socket.socket,
    start: Callable[[], Coroutine[Any, Any, Backend]],
    settings: ServerSettings,
    *,
    on_ready: Callable[[Backend, str], None] | None = None,
    log_level: str = "warning",
) -> None:
    """Starts a backend and serves it on `sock`, a socket of `bind`, until SIGINT or SIGTERM.

    `start` makes the backend; what it raises comes through. `on_ready` is called with the backend and the URL once
    requests are answered. Returns after a clean end; a signal is one, also while the backend starts. Raises EngineDead
    when the engine has died, so that whoever supervises the process starts it again.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    with sock, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(sock, start, settings, on_ready, log_level))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(
    sock: socket.socket,
    start: Callable[[], Coroutine[Any, Any, Backend]],
    settings: ServerSettings,
    on_ready: Callable[[Backend, str], None] | None,
    log_level: str,
) -> None:
    url, stop = url_of(sock), Stop()
    with stop.on_signals():
        backend = await stop.unless_asked(start())
        if backend is None:
            return
        gc.collect()
        gc.freeze()  # what exists now lives as long as the process: later collections need not look at it
        watch = asyncio.create_task(_stop_on_death(backend, stop))
        try:
            ready = None if on_ready is None else partial(on_ready, backend, url)
            await serve_app(sock, backend, settings, stop, on_ready=ready, log_level=log_level)
            if (death := await watch) is not None:
                raise death
        finally:
            watch.cancel()
            await backend.shutdown()


async def _stop_on_death(backend: Backend, stop: Stop) -> EngineDead | None:
    """Asks for a stop when the engine dies, and says how; None when a stop was asked for before."""
    death = await stop.unless_asked(backend.death())
    if death is not None and not stop.asked.is_set():
        stop.ask()
    return death


class Stop:
    """The wish to stop, from a signal or from code; asked twice it means at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def ask(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()

    @contextmanager
    def on_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.ask)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None after cancelling it because a stop was asked for."""
        task, asked = asyncio.create_task(work), asyncio.create_task(self.asked.wait())
        try:
            await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
            return None if task.cancelled() else task.result()
        finally:
            task.cancel()
            asked.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server without signal handlers of its own, and with word of when it answers."""

    on_ready: Callable[[], None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_ready is not None:
            self.on_ready()


async def serve_app(
    sock: socket.socket,
    backend: Backend,
    settings: ServerSettings,
    stop: Stop,
    *,
    on_ready: Callable[[], None] | None = None,
    log_level: str = "warning",
) -> None:
    """Serves `backend` on `sock` until `stop` is asked for and open requests have ended."""
    app = create_app(backend, settings)
    server = _Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=log_level,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
    )
    server.on_ready = on_ready
    ending = asyncio.create_task(_end_when_asked(server, app.state.context, stop))
    try:
        await server.serve([sock])
    finally:
        ending.cancel()


async def _end_when_asked(server: uvicorn.Server, context: Context, stop: Stop) -> None:
    """Requests still open after the grace are told that the server ends; clients that do not read are cut off."""
    await stop.asked.wait()
    server.should_exit = True
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.insisted.wait(), context.settings.shutdown_grace)
    context.drop_running()
    await asyncio.sleep(_FLUSH_SECONDS)
    for connection in list(server.server_state.connections):
        connection.transport.abort()
