"""The engine's process itself: its start, its configuration, its end. `client` exchanges messages with it.

Imports next to nothing, so that the engine begins to import torch before its parent imports anything large. Its sockets
lie in a private folder, which goes away with it; it runs in a session of its own, so Ctrl-C reaches the parent alone,
and stdin stays open as long as the parent lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import msgspec

from octavo.config.engine import EngineConfig

SHORT_SPINS = {"GOMP_SPINCOUNT": "20000"}
"""OpenMP's threads give up their core soon when they wait for one that does not run. Beside a busy thread of this
process on 2 cores, four streams had gaps of 104 to 444 ms with libgomp's own count, of 187 to 197 ms with this one."""
ENGINE_COMMAND = (sys.executable, "-m", "octavo.engine")


class EngineProcess:
    """A process that imports what it needs and waits for its configuration. Belongs to whoever calls `close`."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        """`command` starts the engine; the two endpoints are appended."""
        self._folder = tempfile.TemporaryDirectory(prefix="octavo-", ignore_cleanup_errors=True)
        self.inbox, self.outbox = (f"ipc://{self._folder.name}/{name}" for name in ("in", "out"))
        self.config: EngineConfig | None = None
        """What `configure` has sent."""
        try:
            self._process = subprocess.Popen(
                [*command, self.inbox, self.outbox],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env=SHORT_SPINS | os.environ,
            )
        except BaseException:
            self._folder.cleanup()
            raise
        self.pid, self.wait = self._process.pid, self._process.wait
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def configure(self, config: EngineConfig) -> None:
        """Sends the configuration, once. An engine that has died meanwhile is noticed by who waits for it."""
        self.config = config
        frame = msgspec.msgpack.encode(config)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(struct.pack("<I", len(frame)) + frame)
            self._process.stdin.flush()

    def describe_end(self) -> str:
        """How the process ended, to follow its name."""
        code = self._process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def close(self) -> None:
        """Kills the process if it still runs and removes its sockets. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._folder.cleanup()
