"""`python -m octavo.engine INBOX OUTBOX`: the engine process.

Reads its EngineConfig from stdin (4-byte little-endian length, msgpack) and keeps stdin open: when it closes, the
frontend is gone, and the engine leaves, removing the frontend's socket files.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from octavo.config.engine import EngineConfig
from octavo.core.errors import OctavoError
from octavo.core.request import Ready
from octavo.engine.engine import Engine
from octavo.engine.executor import executor_for
from octavo.engine.loop import Wire, last_words, run
from octavo.kernels.compile import FLOAT, LIKELY, NATIVE, compile_soon


def _read_config() -> EngineConfig:
    (length,) = struct.unpack("<I", sys.stdin.buffer.read(4))
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(length), type=EngineConfig)
    if config.device.kind == "cpu":
        quantized = config.quantization != "none" and config.model.files == "gguf"
        compile_soon((FLOAT, NATIVE), *(LIKELY if quantized else ()))
    return config


def _prepare() -> EngineConfig:
    """The configuration, read and acted upon while torch is imported, without looking for garbage in what stays."""
    gc.disable()
    with ThreadPoolExecutor(1) as reader:
        config = reader.submit(_read_config)
        import octavo.worker  # noqa: F401
    gc.freeze()
    gc.enable()
    return config.result()


def _leave_with_parent(inbox: str) -> None:
    """Ends the process when stdin closes without a Shutdown before it."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        shutil.rmtree(Path(inbox.removeprefix("ipc://")).parent, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(inbox: str, outbox: str) -> int:
    """Returns the exit code: 0 after Shutdown, 1 after a failure, which the frontend has been told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the frontend decides
    config = _prepare()
    wire = Wire(inbox, outbox)
    _leave_with_parent(inbox)
    started = time.monotonic()

    def die(error: OctavoError) -> None:
        """A rank has died, and the loop may wait for it: says so and leaves at once."""
        wire.send_from_thread(last_words(error))
        os._exit(1)

    try:
        engine = Engine(config, executor=executor_for(config, die))
        engine.load(wire.progress)
        wire.send(Ready(msgspec.msgpack.encode(config), config.cache.kv_tokens, time.monotonic() - started))
        gc.freeze()
        run(engine, wire)
    except Exception as error:
        if not isinstance(error, OctavoError):
            traceback.print_exc()
        wire.send(last_words(error))
        wire.close()
        return 1
    engine.close()
    wire.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
