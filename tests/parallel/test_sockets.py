"""Frames over TCP: every reader gets every frame, whole and in order, and strangers get none."""

from __future__ import annotations

import socket
import threading

import pytest

from octavo.core.errors import EngineDead
from octavo.parallel import open_store, sockets
from octavo.parallel.sockets import SECRET_BYTES, SocketReader, SocketWriter

HOST = "127.0.0.1"
FRAMES = [b"", b"a", b"b" * 5000, b"c" * (3 << 20), b"d"]


def test_readers_get_every_frame_in_order_and_strangers_none() -> None:
    writer = SocketWriter(HOST, 2)
    stranger = socket.create_connection((HOST, writer.port))
    stranger.sendall(b"x" * SECRET_BYTES)
    readers = [SocketReader(HOST, writer.port, secret) for secret in reversed(writer.secrets)]
    writer.accept()
    assert stranger.recv(1) == b""
    got: list[list[bytes]] = [[], []]

    def read(index: int) -> None:
        got[index] += [readers[index].read() for _ in FRAMES]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for frame in FRAMES:
        writer.write(frame)
    for thread in threads:
        thread.join()
    assert got == [FRAMES, FRAMES]
    writer.close()
    for reader in readers:
        with pytest.raises(ConnectionError):
            reader.read()
        reader.close()
    stranger.close()


def test_a_writer_that_is_held_up_asks_whether_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "STALL_SECONDS", 0.01)
    writer = SocketWriter(HOST, 1)
    reader = SocketReader(HOST, writer.port, writer.secrets[0])
    writer.accept()

    def gone() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        writer.write(bytes(64 << 20), gone)
    reader.close()
    writer.close()


def test_a_reader_that_does_not_come_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "ACCEPT_SECONDS", 0.01)
    writer = SocketWriter(HOST, 1)
    with pytest.raises(EngineDead, match="has not connected"):
        writer.accept()
    writer.close()


def test_the_store_listens_on_its_address_alone() -> None:
    store = open_store()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))
    socket.create_connection((HOST, store.port)).close()
