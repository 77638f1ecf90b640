"""The engine behind sockets: drains messages, turns the loop, sends what came out.

Owns the wire between frontend and engine process (one msgpack frame a message). Does not own decisions or devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import zmq

from octavo.core.request import (
    Add,
    Died,
    Finish,
    FromEngine,
    Outputs,
    Progress,
    Reply,
    ResetPrefixCache,
    Shutdown,
    ToEngine,
)
from octavo.engine.engine import Engine

IDLE_SECONDS = 1.0
"""After so long without a request there is time to prepare for grammars, which takes a core for half a second."""
STATS_SECONDS = 0.5
"""How old the frontend's statistics may get while there is work, though no step has anything to tell."""


class Wire:
    """Messages of the frontend in, messages of the engine out. Both endpoints are bound by the frontend."""

    def __init__(self, inbox: str, outbox: str) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket, endpoint in ((self._inbox, inbox), (self._outbox, outbox)):
            socket.setsockopt(zmq.LINGER, 1000)
            socket.set_hwm(0)
            socket.connect(endpoint)
        self._endpoint = outbox
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def drain(self, *, block: bool) -> list[ToEngine]:
        """All messages that have arrived; with `block`, waits for the first."""
        messages: list[ToEngine] = []
        if block:
            messages.append(self._decoder.decode(self._inbox.recv()))
        while self._inbox.poll(0):
            messages.append(self._decoder.decode(self._inbox.recv()))
        return messages

    def quiet(self, seconds: float) -> bool:
        """Whether no message arrives for so long."""
        return not self._inbox.poll(int(seconds * 1000))

    def send(self, message: FromEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def progress(self, what: str, done: int, total: int) -> None:
        self.send(Progress(what, done, total))

    def send_from_thread(self, message: FromEngine) -> None:
        """Sends while the loop may be anywhere, over a socket of its own; returns once the message has gone out."""
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(self._endpoint)
            socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._context.term()


def run(engine: Engine, wire: Wire) -> None:
    """Serves until Shutdown arrives. Raises EngineDead when the engine cannot go on.

    Grammars' vocabulary is prepared as soon as nobody waits for tokens.
    """
    busy = prepared = False
    told = -STATS_SECONDS
    while True:
        if not (busy or prepared) and wire.quiet(IDLE_SECONDS):
            engine.prepare_vocabulary()
            prepared = True
        for message in wire.drain(block=not busy):
            match message:
                case Shutdown():
                    return
                case _:
                    _handle(engine, message, wire.send)
        deltas = engine.step() if engine.has_work() else []
        was_busy, busy = busy, engine.has_work()
        now = time.monotonic()
        if deltas or (was_busy and not busy) or (busy and now - told >= STATS_SECONDS):
            wire.send(Outputs(deltas, engine.stats))
            told = now


def _handle(engine: Engine, message: ToEngine, send: Callable[[FromEngine], None]) -> None:
    match message:
        case Add(requests):
            for request in requests:
                engine.add(request)
        case Finish(sequences):
            if deltas := engine.finish(sequences):
                send(Outputs(deltas, engine.stats))
        case ResetPrefixCache(call):
            send(Reply(call, engine.reset_prefix_cache()))
        case Shutdown():
            raise AssertionError("handled by the loop")


def last_words(error: BaseException) -> Died:
    """What the frontend is told when the engine ends because of `error`."""
    from octavo.core.errors import ConfigError

    return Died(str(error) or repr(error), config=isinstance(error, ConfigError))
