"""What a client may do with HTTP itself."""

from __future__ import annotations

import socket

import pytest

from octavo.server.protocol import MAX_HEAD_BYTES
from tests.server.live import Live

BODY = b'{"prompt": "abc"}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: octavo\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=10)


def answer(live: Live, *pieces: bytes) -> bytes:
    """What comes back for `pieces`."""
    with connect(live) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while not received.endswith((b"}", b".")) and (more := connection.recv(65536)):
            received += more
        return received


@pytest.mark.parametrize("rest", [b"x: ", b"x", b"x: y\r\n" * (MAX_HEAD_BYTES // 6)], ids=["value", "name", "many"])
def test_a_head_that_never_ends_is_refused(live: Live, rest: bytes) -> None:
    refusal = answer(live, POST + rest, b"a" * (MAX_HEAD_BYTES - len(rest)))
    assert refusal.startswith(b"HTTP/1.1 400 ")
    assert str(MAX_HEAD_BYTES).encode() in refusal


@pytest.mark.parametrize("rest", [b"1;", b"0\r\nx: "], ids=["chunk", "trailer"])
def test_so_is_what_stands_around_a_body(live: Live, rest: bytes) -> None:
    with connect(live) as connection:
        connection.sendall(POST + CHUNKED + b"expect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(rest + b"a" * MAX_HEAD_BYTES)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_large_bodies_and_several_requests_are_no_large_head(live: Live) -> None:
    large = b'{"prompt": "abc"' + b" " * 3 * MAX_HEAD_BYTES + b"}"
    request = POST + b"content-length: %d\r\n\r\n%b" % (len(large), large)
    assert answer(live, *[request] * 3).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("wish", [b"h2c", b"websocket"])
def test_a_wish_for_another_protocol_is_ignored(live: Live, wish: bytes) -> None:
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABk\r\n" % wish
    whole = b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
    chunked = CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    for rest in (whole, chunked):
        told = answer(live, head, rest)
        assert told.startswith(b"HTTP/1.1 200 ")
        assert b'"text":"abc"' in told
