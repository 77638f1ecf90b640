"""Ranks as processes of one machine, started here and told what to do through one ring of shared memory.

A rank that dies takes all others along, and nothing of them is left. Does not know what a plan means.

    engine                                        python -m octavo.worker INDEX ...
    start; stdin: Start                -------->  import torch
                                       <--------  "up"
    connect, load                                 connect, load
                                       <--------  "ready"
    Plan, Sample, ... through the ring -------->  forward, sample
    LEAVE, or EOF of stdin             -------->  exit
"""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from octavo.config.engine import EngineConfig
from octavo.core.errors import ConfigError, EngineDead, OctavoError
from octavo.engine.ranks import GRACE_SECONDS, OnDeath, Peers
from octavo.parallel.ring import RingWriter
from octavo.worker.frames import Start


class Processes(Peers):
    """Peers that are child processes."""

    def __init__(self, config: EngineConfig, on_death: OnDeath) -> None:
        from octavo.parallel.comm import HOST, open_store

        ranks = config.parallel.ranks
        super().__init__(ranks - 1, on_death)
        self.store = open_store()
        self.start = Start(0, config, (HOST, self.store.port), HOST, (0, ranks))
        self._ring = RingWriter(self.count)
        self._processes = [self._spawn(rank) for rank in range(1, ranks)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), daemon=True)
            for rank, process in enumerate(self._processes, 1)
        ]
        for watcher in self._watchers:
            watcher.start()

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        descriptors = self._ring.descriptors(rank - 1)
        process = subprocess.Popen(
            [sys.executable, "-m", "octavo.worker", *map(str, (rank - 1, *descriptors))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
        )
        _, ranks = self.start.neighbours
        start = msgspec.structs.replace(
            self.start, rank=rank, config=of_rank(self.start.config, rank), neighbours=(rank, ranks)
        )
        frame = msgspec.msgpack.encode(start)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its watcher will tell
            process.stdin.write(struct.pack("<I", len(frame)) + frame)
            process.stdin.flush()
        return process

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line.decode(errors="replace").strip()
            self._hear(rank, last)
        code = process.wait()
        self.fall(_cause(rank, process.pid, code, "" if last in ("up", "ready") else last))

    def _write(self, frame: bytes, check: Callable[[], None]) -> None:
        self._ring.write(frame, check)

    def _await_end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _release(self) -> None:
        for watcher in self._watchers:
            watcher.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._ring.close()


def of_rank(config: EngineConfig, rank: int) -> EngineConfig:
    """The configuration with the rank's own device."""
    if config.device.kind == "cpu":
        return config
    device = msgspec.structs.replace(config.device, index=config.device.index + rank)
    return msgspec.structs.replace(config, device=device)


def _cause(rank: int, pid: int, code: int, words: str) -> OctavoError:
    if code == 2:
        return ConfigError(words)
    said = f": {words}" if words else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return EngineDead(f"rank {rank} (process {pid}) was killed by {name}, exit code {code}{hint}{said}")
    return EngineDead(f"rank {rank} (process {pid}) ended with exit code {code}{said}")
