"""The ranks of an engine as processes of one machine: rank 0 here, the others started here and told what to do.

Plans and masks go out as frames through one ring of shared memory; all ranks do the same in the same order. Owns those
processes: a rank that dies takes all others along, and nothing of them is left. Does not know what a plan means.

    engine                                        python -m octavo.worker RANK ...
    start; stdin: Start                -------->  import torch
                                       <--------  "up"
    connect, load                                 connect, load
                                       <--------  "ready"
    Plan, Sample, ... through the ring -------->  forward, sample
    LEAVE, or EOF of stdin             -------->  exit
"""

from __future__ import annotations

import contextlib
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.config.engine import EngineConfig
from octavo.config.parallel import place_of
from octavo.core.errors import ConfigError, EngineDead, OctavoError
from octavo.core.plan import Masks, Plan, StepResult
from octavo.parallel.ring import RingWriter
from octavo.worker.frames import Frame, Order, Sample, Start, encode_frame

if TYPE_CHECKING:
    from octavo.engine.executor import Progress, Sampled

OnDeath = Callable[[OctavoError], None]
GRACE_SECONDS = 5.0
"""How long a rank may take to leave."""
CAUSE_SECONDS = 1.0
"""How long after a failure here the death of another rank, its likely cause, is waited for."""


class Processes:
    """The processes of ranks 1 to N - 1. `on_death` is called once, in a thread, with what killed one of them."""

    def __init__(self, config: EngineConfig, port: int, on_death: OnDeath) -> None:
        count = config.parallel.ranks - 1
        self._on_death, self._lock = on_death, threading.Lock()
        self._words: queue.Queue[tuple[int, str] | OctavoError] = queue.Queue()
        self._died = threading.Event()
        self._error: OctavoError | None = None
        self._closing = False
        self._ring = RingWriter(count)
        self._processes = [self._start(rank, config, port) for rank in range(1, count + 1)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), daemon=True)
            for rank, process in enumerate(self._processes, 1)
        ]
        for watcher in self._watchers:
            watcher.start()

    def _start(self, rank: int, config: EngineConfig, port: int) -> subprocess.Popen[bytes]:
        descriptors = self._ring.descriptors(rank - 1)
        process = subprocess.Popen(
            [sys.executable, "-m", "octavo.worker", *map(str, (rank, *descriptors))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
        )
        frame = msgspec.msgpack.encode(Start(of_rank(config, rank), port))
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
            self._words.put((rank, last))
        code = process.wait()
        with self._lock:
            if self._closing or self._error is not None:
                return
            self._error = _cause(rank, process.pid, code, "" if last in ("up", "ready") else last)
        self._kill()
        self._died.set()
        self._words.put(self._error)
        self._on_death(self._error)

    def wait_for(self, word: str) -> None:
        """Until every rank has said `word`. Raises what killed one of them."""
        waiting = set(range(1, len(self._processes) + 1))
        while waiting:
            said = self._words.get()
            if isinstance(said, OctavoError):
                raise said
            if said[1] == word:
                waiting.discard(said[0])

    def check(self, seconds: float = 0.0) -> None:
        """Raises what killed a rank, if one has died or dies within `seconds`."""
        if self._died.wait(seconds) if seconds else self._error is not None:
            assert self._error is not None
            raise self._error

    def tell(self, frame: Frame) -> None:
        """To all ranks. Raises what killed one of them."""
        self.check()
        self._ring.write(encode_frame(frame), self.check)

    def close(self) -> None:
        """Lets all leave; the ones that do not are killed. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._error is None:
            with contextlib.suppress(OctavoError):
                self._ring.write(encode_frame(Order.LEAVE), self._give_up)
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
        self._kill()
        for watcher in self._watchers:
            watcher.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._ring.close()

    def _give_up(self) -> None:
        raise EngineDead("a rank does not read")

    def _kill(self) -> None:
        """Ends what runs, and takes in what has ended."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


class ProcessExecutor:
    """An Executor whose ranks are processes. `on_death` hears, in a thread and at once, when one has died.

    A failure of a step leaves ranks in different states, so it is the end of all: every call then raises EngineDead.

    Between the stages of a pipeline on CPUs a forward pass waits for the stage before, so rank 0, of the last stage,
    runs its own when the result is asked for: until then further plans can be launched.
    """

    def __init__(self, config: EngineConfig, on_death: OnDeath | None = None) -> None:
        self._config, self._notify = config, on_death
        self._waits = config.parallel.pipeline > 1 and config.device.kind == "cpu"
        self._links: Any = None
        self._worker: Any = None

    def load(self, progress: Progress | None = None) -> None:
        import torch

        from octavo.parallel import connect, open_store
        from octavo.worker import Worker

        config = self._config
        device = torch.device("cpu")
        if config.device.kind == "cuda":
            device = torch.device("cuda", config.device.index)
            torch.cuda.set_device(device)
        store = open_store()
        self._processes = Processes(config, store.port, self._on_death)
        try:
            self._processes.wait_for("up")
            place = place_of(0, config.parallel.tensor, config.parallel.pipeline)
            self._links = connect(place, store, device)
            self._worker = Worker(config, self._links)
            self._worker.load(progress)
            self._processes.wait_for("ready")
        except BaseException:
            self._processes.close()
            raise

    def _on_death(self, error: OctavoError) -> None:
        if self._notify is not None:
            self._notify(error)
        if self._links is not None:
            self._links.abort()

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """A failure within is the engine's death, for which another rank's is the better reason."""
        try:
            yield
        except Exception as error:
            self._processes.check(CAUSE_SECONDS)
            self._processes.close()
            raise EngineDead(f"rank 0 failed: {error!r}") from error
        self._processes.check()

    def warm_up(self) -> None:
        with self._fatal():
            self._processes.tell(Order.WARM_UP)
            self._worker.warm_up()

    def launch(self, plan: Plan) -> Callable[[Masks | None], Sampled]:
        with self._fatal():
            self._processes.tell(plan)
            forward = None if self._waits else self._worker.forward(plan)

        def sample(masks: Masks | None) -> Sampled:
            with self._fatal():
                self._processes.tell(Sample(masks))
                step = None if forward is None else self._worker.sample(forward, masks)
            return _Result(self, plan, masks, step)

        return sample

    def finish(self, plan: Plan, masks: Masks | None, step: Sampled | None) -> StepResult:
        """The result of a launched step; runs what of it has waited here."""
        with self._fatal():
            if step is None:
                step = self._worker.sample(self._worker.forward(plan), masks)
            return step.result()

    def close(self) -> None:
        """Ends the other ranks, and this one's connections with them."""
        self._processes.close()
        self._links = self._worker = None


class _Result:
    """A step whose result is taken in order."""

    def __init__(self, executor: ProcessExecutor, plan: Plan, masks: Masks | None, step: Sampled | None) -> None:
        self._executor, self._plan, self._masks, self._step = executor, plan, masks, step

    def result(self) -> StepResult:
        return self._executor.finish(self._plan, self._masks, self._step)


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
