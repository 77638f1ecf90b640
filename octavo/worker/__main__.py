"""`python -m octavo.worker RANK MEMORY DOORBELL`: a rank of the engine beside rank 0, which is the engine's process.

Reads Start from stdin (4-byte little-endian length, msgpack) and keeps stdin open: when it closes, the engine is gone,
and the rank leaves. MEMORY and DOORBELL are descriptors of its ring (octavo.parallel.ring). What it says on stdout:
"up" before it connects, "ready" once it is loaded, and in case its last words. Exit codes: 0 told to leave, 2 something
to correct in the configuration, 1 any other failure.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from octavo.config.parallel import place_of
from octavo.core.errors import ConfigError
from octavo.core.plan import Plan
from octavo.parallel.ring import RingReader
from octavo.worker.frames import Order, Sample, Start, decode_frame

if TYPE_CHECKING:
    from octavo.worker.worker import Forward, Worker


def _read_start() -> Start:
    (length,) = struct.unpack("<I", sys.stdin.buffer.read(4))
    return msgspec.msgpack.decode(sys.stdin.buffer.read(length), type=Start)


def _leave_with_engine() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load(rank: int, start: Start, say: Callable[[str], None]) -> Worker:
    import torch

    from octavo.parallel import connect, join_store
    from octavo.worker import Worker

    config = start.config
    say("up")
    device = torch.device("cpu")
    if config.device.kind == "cuda":
        device = torch.device("cuda", config.device.index)
        torch.cuda.set_device(device)
    place = place_of(rank, config.parallel.tensor, config.parallel.pipeline)
    worker = Worker(config, connect(place, join_store(start.port), device))
    worker.load()
    return worker


def serve(worker: Worker, ring: RingReader) -> None:
    """Does what the frames say until one says to leave."""
    forward: Forward | None = None
    while True:
        match decode_frame(ring.read()):
            case Plan() as plan:
                forward = worker.forward(plan)
            case Sample(masks):
                assert forward is not None
                if worker.samples:
                    worker.sample(forward, masks)
                else:
                    worker.expect(forward)
            case Order.WARM_UP:
                worker.warm_up()
            case Order.LEAVE:
                return


def main(rank: int, memory: int, doorbell: int) -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the engine decides
    words = os.dup(1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        os.write(words, text.encode() + b"\n")

    start = _read_start()
    _leave_with_engine()
    try:
        worker = _load(rank, start, say)
        say("ready")
        serve(worker, RingReader(rank - 1, memory, doorbell))
    except ConfigError as error:
        say(str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        say(repr(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(*map(int, sys.argv[1:4]))
    sys.stderr.flush()
    os._exit(code)  # the groups' own endings wait for other ranks
