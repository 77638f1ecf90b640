"""A scripted engine process: speaks the engine's protocol and echoes each prompt's tokens, one a step.

    python fake_engine.py MODE INBOX OUTBOX

MODE ok serves; config refuses its configuration; crash exits while loading; stubborn ignores Shutdown and SIGTERM.
A request's cache_salt scripts it: "die" ends the process with exit code 7, "died" with last words, "hang" is never
answered. Stats tell what the engine saw: `preemptions` counts Finish entries, `prefix_queries` Add messages.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from typing import Any

import msgspec
import zmq

from octavo.config.engine import EngineConfig
from octavo.core.request import (
    Add,
    Delta,
    Died,
    Finish,
    FromEngine,
    Outputs,
    Progress,
    Ready,
    Reply,
    Request,
    ResetPrefixCache,
    Shutdown,
    Stats,
    ToEngine,
)


class EchoEngine:
    """Token i of every sequence is token i of its prompt, around and around, until max_tokens."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, int], tuple[Request, int]] = {}
        self.stats = Stats()

    def add(self, request: Request) -> None:
        for index in range(request.params.n):
            self.running[request.id, index] = (request, 0)

    def finish(self, sequences: list[tuple[str, int]]) -> list[Delta]:
        self.stats.preemptions += len(sequences)
        gone = {key for id_, index in sequences for key in self.running if key[0] == id_ and index in (-1, key[1])}
        return [Delta(*key, [], "abort") for key in gone if self.running.pop(key)[0].whole]

    def has_work(self) -> bool:
        return any(request.cache_salt != "hang" for request, _ in self.running.values())

    def step(self) -> list[Delta]:
        deltas = []
        self.stats.steps += 1
        for key, (request, done) in list(self.running.items()):
            if request.cache_salt == "hang":
                continue
            token = request.prompt_token_ids[done % len(request.prompt_token_ids)]
            last = done + 1 == request.params.max_tokens
            deltas.append(Delta(*key, [token], "length" if last else None, scheduled_at=request.arrival))
            self.running[key] = (request, done + 1)
            if last:
                del self.running[key]
        self.stats.generated_tokens += len(deltas)
        self.stats.running = len(self.running)
        return deltas


def serve(mode: str, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    def send(message: FromEngine) -> None:
        outbox.send(msgspec.msgpack.encode(message))

    engine = EchoEngine()
    send(Progress("weights", 1, 2))
    send(Ready(b"", 1000, 0.0))
    decode = msgspec.msgpack.Decoder(ToEngine).decode
    while True:
        while inbox.poll(0 if engine.has_work() else None):
            match decode(inbox.recv()):
                case Add(requests):
                    engine.stats.prefix_queries += 1
                    for request in requests:
                        if request.cache_salt == "die":
                            os._exit(7)
                        if request.cache_salt == "died":
                            send(Died("out of memory in step 3"))
                            inbox.close(0)
                            outbox.close(1000)
                            outbox.context.term()  # waits until the last words are gone
                            os._exit(1)
                        engine.add(request)
                case Finish(sequences):
                    deltas = engine.finish(sequences)
                    engine.stats.running = len(engine.running)
                    send(Outputs(deltas, engine.stats))
                case ResetPrefixCache(call):
                    send(Reply(call, not engine.running))
                case Shutdown() if mode != "stubborn":
                    return
        if engine.has_work():
            send(Outputs(engine.step(), engine.stats))


def leave_with_parent() -> None:
    while os.read(0, 100):
        pass
    os._exit(0)


def main(mode: str, inbox_at: str, outbox_at: str) -> None:
    stdin = sys.stdin.buffer
    size: Any = struct.unpack("<I", stdin.read(4))[0]
    config = msgspec.msgpack.decode(stdin.read(size), type=EngineConfig)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(inbox_at)
    outbox.connect(outbox_at)
    if mode == "config":
        outbox.send(msgspec.msgpack.encode(Died(f"{config.dtype} does not fit: need 3 have 2", True)))
        outbox.close(1000)
        return
    if mode == "crash":
        os._exit(9)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        threading.Thread(target=leave_with_parent, daemon=True).start()
    serve(mode, inbox, outbox)
    inbox.close(0)
    outbox.close(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
