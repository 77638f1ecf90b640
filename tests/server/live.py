"""The app over the scripted backend, served on a loopback port."""

from __future__ import annotations

import asyncio
import threading

from octavo.server import ServerSettings, bind, url_of
from octavo.server.run import Stop, serve_app
from tests.server.echo import EchoBackend

SETTINGS = ServerSettings(served_model_names=("echo", "org/echo"), shutdown_grace=0.2)


class Live:
    """A real server on a loopback port, in a thread."""

    def __init__(self, settings: ServerSettings = SETTINGS) -> None:
        self.backend = EchoBackend()
        self._settings = settings
        self._sock = bind("127.0.0.1", 0)
        self.url = url_of(self._sock)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        self._stop = Stop()
        self._loop = asyncio.get_running_loop()
        with self._sock:
            await serve_app(self._sock, self.backend, self._settings, self._stop, on_ready=self._ready.set)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.ask)
        self._thread.join(10)
        assert not self._thread.is_alive()
