"""The ranks of an engine: rank 0 in this process, its peers elsewhere, all told the same in the same order.

Owns the order of telling and doing, and what the death of a peer means: the end of all. Does not own how peers are
started and reached (`processes` on this machine, `ray` on several) or what a plan means.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from octavo.config.engine import EngineConfig
from octavo.core.errors import EngineDead, OctavoError
from octavo.core.plan import Masks, Plan, StepResult
from octavo.worker.frames import Frame, Order, Sample, Start, encode_frame

if TYPE_CHECKING:
    from octavo.engine.executor import Progress, Sampled

OnDeath = Callable[[OctavoError], None]
GRACE_SECONDS = 5.0
"""How long peers may take to leave."""


class Peers(ABC):
    """Ranks 1 to N - 1, started. `on_death` is called once, in a thread, with what killed one of them."""

    start: Start
    """How rank 0 meets them."""
    store: Any
    """Where: the store of rank 0."""
    cause_seconds = 1.0
    """How long after a failure here the death of a peer, its likely cause, is waited for."""

    def __init__(self, count: int, on_death: OnDeath) -> None:
        self.count = count
        self._on_death, self._lock = on_death, threading.Lock()
        self._words: queue.Queue[tuple[int, str]] = queue.Queue()
        self._died = threading.Event()
        self._error: OctavoError | None = None
        self._closing = False

    @abstractmethod
    def _write(self, frame: bytes, check: Callable[[], None]) -> None:
        """Sends a frame to all; `check` is asked while one of them takes nothing."""

    @abstractmethod
    def _await_end(self) -> None:
        """Until all have left, or GRACE_SECONDS are over."""

    @abstractmethod
    def _kill(self) -> None:
        """Ends those that run. From any thread."""

    @abstractmethod
    def _release(self) -> None:
        """Gives back what was held for them, once all have ended."""

    def _hear(self, rank: int, word: str) -> None:
        """A peer says how far it is: "up" or "ready"."""
        self._words.put((rank, word))

    def fall(self, error: OctavoError) -> None:
        """A rank has died of `error`, and takes all others along. Only the first death counts."""
        with self._lock:
            if self._closing or self._error is not None:
                return
            self._error = error
        self._kill()
        self._died.set()
        self._words.put((0, ""))  # wakes who waits for words
        self._on_death(error)

    def wait_for(self, word: str) -> None:
        """Until every peer has said `word`. Raises what killed one of them."""
        waiting = set(range(1, self.count + 1))
        while waiting:
            rank, said = self._words.get()
            self.check()
            if said == word:
                waiting.discard(rank)

    def check(self, seconds: float = 0.0) -> None:
        """Raises what killed a rank, if one has died or dies within `seconds`: a new error, for a raised one holds on
        to the frames that it came through, and they to sockets.
        """
        if self._died.wait(seconds) if seconds else self._error is not None:
            assert self._error is not None
            raise type(self._error)(*self._error.args)

    def tell(self, frame: Frame) -> None:
        """To all peers. Raises what killed a rank."""
        self.check()
        self._write(encode_frame(frame), self.check)

    def close(self) -> None:
        """Lets all leave; those that do not are killed. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._error is None:
            with contextlib.suppress(OctavoError, OSError):
                self._write(encode_frame(Order.LEAVE), _give_up)
            self._await_end()
        self._kill()
        self._release()
        self.store = None  # whose port ends with it


def _give_up() -> None:
    raise EngineDead("a rank does not read")


class RanksExecutor:
    """An Executor of several ranks. `start` starts the peers; `on_death` hears, in a thread and at once, if one dies.

    A failure of a step leaves ranks in different states, so it is the end of all: every call then raises EngineDead.

    Between the stages of a pipeline on CPUs a forward pass waits for the stage before, so rank 0, of the last stage,
    runs its own when the result is asked for: until then further plans can be launched.
    """

    _peers: Peers

    def __init__(
        self,
        config: EngineConfig,
        start: Callable[[EngineConfig, OnDeath], Peers],
        on_death: OnDeath | None = None,
    ) -> None:
        self._config, self._start, self._notify = config, start, on_death
        self._waits = config.parallel.pipeline > 1 and config.device.kind == "cpu"
        self._links: Any = None
        self._worker: Any = None

    def load(self, progress: Progress | None = None) -> None:
        from octavo.parallel import ALONE
        from octavo.worker import Worker
        from octavo.worker.rank import join

        self._peers = self._start(self._config, self._on_death)
        try:
            self._peers.wait_for("up")
            self._links = join(self._peers.start, self._peers.store) if self._peers.count else ALONE
            self._worker = Worker(self._peers.start.config, self._links)
            self._worker.load(progress)
            self._peers.wait_for("ready")
        except BaseException:
            self._peers.close()
            raise

    def _on_death(self, error: OctavoError) -> None:
        if self._notify is not None:
            self._notify(error)
        if self._links is not None:
            self._links.abort()

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """A failure within is the engine's death, for which a peer's is the better reason."""
        try:
            yield
        except Exception as error:
            self._peers.check(self._peers.cause_seconds)
            reason = f"rank 0 failed: {error!r}"
            self._peers.fall(EngineDead(reason))
            raise EngineDead(reason) from error
        self._peers.check()

    def warm_up(self) -> None:
        with self._fatal():
            self._peers.tell(Order.WARM_UP)
            self._worker.warm_up()

    def launch(self, plan: Plan) -> Callable[[Masks | None], Sampled]:
        with self._fatal():
            self._peers.tell(plan)
            forward = None if self._waits else self._worker.forward(plan)

        def sample(masks: Masks | None) -> Sampled:
            with self._fatal():
                self._peers.tell(Sample(masks))
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
        """Ends the peers, and this rank's connections with them."""
        if self._worker is not None:
            self._peers.close()
        self._worker = None
        if self._links is not None:
            self._links.abort()  # a group's own ending would wait for the peers
        self._links = None


class _Result:
    """A step whose result is taken in order."""

    def __init__(self, executor: RanksExecutor, plan: Plan, masks: Masks | None, step: Sampled | None) -> None:
        self._executor, self._plan, self._masks, self._step = executor, plan, masks, step

    def result(self) -> StepResult:
        return self._executor.finish(self._plan, self._masks, self._step)
