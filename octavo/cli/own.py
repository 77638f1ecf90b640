"""A server of one's own: engine and HTTP side in this process, reachable from this process alone.

`octavo chat` speaks HTTP to whatever server there is, so that a conversation is the same with either. The server's
event loop turns in a thread, whatever the terminal waits for. Owns that thread.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from octavo.cli.session import start_engine
from octavo.config.args import EngineArgs
from octavo.core.errors import ConfigError

T = TypeVar("T")

_LAST_TASKS_SECONDS = 10.0
"""How long what was cancelled may take to end."""


class _LoopThread:
    """An event loop in a thread. Leaving it waits for the tasks that are still ending."""

    def __enter__(self) -> _LoopThread:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._closing = asyncio.Event()

        async def main() -> None:
            started.set_result(asyncio.get_running_loop())
            await self._closing.wait()
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others, timeout=_LAST_TASKS_SECONDS)

        self._thread = threading.Thread(target=asyncio.run, args=(main(),), name="octavo-server")
        self._thread.start()
        self.loop = started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; Ctrl-C cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


@contextmanager
def own_server(args: EngineArgs) -> Iterator[tuple[str, str]]:
    """URL and key of a server that is started with `args`, and ended on leaving.

    Raises ConfigError for settings that cannot work or a model that cannot chat, EngineDead.
    """
    from octavo.formats.locate import DEFAULT_MODEL
    from octavo.server.backend import ServerSettings
    from octavo.server.listen import bind, url_of
    from octavo.server.run import Stop, serve_app

    key = secrets.token_urlsafe()
    settings = ServerSettings(served_model_names=(args.model or DEFAULT_MODEL,), api_keys=(key,))
    with bind("127.0.0.1", 0) as sock, _LoopThread() as thread:
        llm = thread.run(start_engine(args))
        try:
            if llm.chat_template is None:
                raise ConfigError(f"{llm.facts.path} has no chat template: use octavo complete")
            stop = Stop()
            serving = thread.submit(serve_app(sock, llm, settings, stop))
            try:
                yield url_of(sock), key
            finally:
                thread.loop.call_soon_threadsafe(stop.ask)
                serving.result()
        finally:
            thread.run(llm.shutdown())
