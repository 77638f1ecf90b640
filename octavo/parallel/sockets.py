"""Frames from one process to others on any machine, over TCP: what `ring` does within one.

A reader says a secret of its own before it is sent anything, so a stranger that finds the port learns nothing. Whatever
network the ranks share is trusted beyond that, as their collectives trust it.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Callable

from octavo.core.errors import EngineDead

SECRET_BYTES = 32
ACCEPT_SECONDS = 30.0
"""How long readers may take that are known to be connecting."""
STALL_SECONDS = 0.5
"""How often a writer that is held up asks whether to go on."""
_LENGTH = struct.Struct("<I")


def _never() -> None:
    """The writer's `check` where nothing can go wrong."""


class SocketWriter:
    """Listens at `host` on a free `port` for `readers`, each of which brings its entry of `secrets`."""

    def __init__(self, host: str, readers: int) -> None:
        self._listener = socket.create_server((host, 0), backlog=2 * readers + 8)
        self.port: int = self._listener.getsockname()[1]
        self.secrets = [secrets.token_bytes(SECRET_BYTES) for _ in range(readers)]
        self._readers: dict[bytes, socket.socket] = {}

    def accept(self) -> None:
        """Waits until all readers are there. Raises EngineDead when one does not come."""
        until = time.monotonic() + ACCEPT_SECONDS
        while len(self._readers) < len(self.secrets):
            try:
                self._listener.settimeout(max(until - time.monotonic(), 0.001))
                reader, _ = self._listener.accept()
            except TimeoutError:
                raise EngineDead(f"a rank has not connected within {ACCEPT_SECONDS} s") from None
            try:
                reader.settimeout(STALL_SECONDS)
                secret = _take(reader, SECRET_BYTES)
            except OSError:
                secret = b""
            if secret not in self.secrets or secret in self._readers:
                reader.close()
                continue
            reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._readers[secret] = reader

    def write(self, frame: bytes, check: Callable[[], None] = _never) -> None:
        """Sends a frame to every reader. While one takes nothing, `check` is asked, which may raise.

        Raises OSError when a reader is gone.
        """
        whole = memoryview(_LENGTH.pack(len(frame)) + frame)
        for reader in self._readers.values():
            rest = whole
            while rest:
                try:
                    rest = rest[reader.send(rest) :]
                except TimeoutError:
                    check()

    def close(self) -> None:
        for held in (self._listener, *self._readers.values()):
            held.close()


class SocketReader:
    """The reader whose `secret` it is. Raises OSError when the writer cannot be reached."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.sendall(secret)

    def read(self) -> bytes:
        """The next frame; waits for it. Raises ConnectionError when the writer is gone."""
        (length,) = _LENGTH.unpack(_take(self._socket, _LENGTH.size))
        return _take(self._socket, length)

    def close(self) -> None:
        self._socket.close()


def _take(connection: socket.socket, size: int) -> bytes:
    taken = bytearray()
    while len(taken) < size:
        more = connection.recv(size - len(taken))
        if not more:
            raise ConnectionError("the other side has closed the connection")
        taken += more
    return bytes(taken)
