"""`python -m octavo.worker INDEX MEMORY DOORBELL`: a rank of the engine as a process beside the engine's own.

Reads Start from stdin (4-byte little-endian length, msgpack) and keeps stdin open: when it closes, the engine is gone,
and the rank leaves. MEMORY and DOORBELL are descriptors of its ring (octavo.parallel.ring), reader INDEX of it.
What it says on stdout: "up" before it connects, "ready" once it is loaded, and in case its last words. Exit codes: 0
told to leave, 2 something to correct in the configuration, 1 any other failure.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import traceback

import msgspec

from octavo.core.errors import ConfigError
from octavo.parallel.ring import RingReader
from octavo.worker.frames import Start


def _read_start() -> Start:
    (length,) = struct.unpack("<I", sys.stdin.buffer.read(4))
    return msgspec.msgpack.decode(sys.stdin.buffer.read(length), type=Start)


def _leave_with_engine() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(index: int, memory: int, doorbell: int) -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the engine decides
    words = os.dup(1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        os.write(words, text.encode() + b"\n")

    start = _read_start()
    _leave_with_engine()
    try:
        from octavo.worker.rank import load, serve

        say("up")
        worker = load(start)
        say("ready")
        serve(worker, RingReader(index, memory, doorbell).read)
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
