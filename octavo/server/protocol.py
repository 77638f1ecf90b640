"""HTTP/1.1 as uvicorn reads it, but heads have an end, and who asks for an upgrade is answered without one.

httptools keeps a head until it ends, at a cost that grows with its square, and leaves out the body of a request that
asks for HTTP/2 (h2c), as Java's own client does at first. A server may ignore that wish (RFC 9110, section 7.8).
"""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16

_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    """One connection."""

    _in_body = False
    _held = 0
    """Bytes since a head ended or a piece of a body came: of a head, or of what stands around the pieces of a body."""

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            head, end, body = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade", head) + end + body
        self._held += len(data)
        super().data_received(data)
        if self._held > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of the request has more than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._in_body, self._held = True, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()
