"""The engine: scheduler and worker joined by a loop that runs at most one step ahead.

Owns the order of launching, committing and sampling, and what happens when a step fails. Does not know sockets (`loop`)
or text (`frontend`).

With overlap 1, step N+1 is planned and launched before step N's tokens reach the host:

    host    | schedule N+1 | forward N+1 | commit N   | sample N+1 | schedule N+2 | ...
    device  | ..forward N.......sample N | forward N+1 ........................| sample N+1 | ...
                                         ^ N's tokens arrive; they lie in the row state, where N+1 reads them

With overlap 0 each step is committed before the next is planned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from octavo.cache import CacheManager
from octavo.config.engine import EngineConfig
from octavo.core.errors import EngineDead
from octavo.core.request import Delta, Request, Stats
from octavo.engine.executor import Executor, InlineExecutor, Progress, Sampled
from octavo.scheduler import Constraint, Proposer, Scheduler

logger = logging.getLogger("octavo")
MAX_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""


class Engine:
    """Serves requests step by step: `add`, then `step` while `has_work`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        executor: Executor | None = None,
        constraints: Iterable[Constraint] = (),
        proposer: Proposer | None = None,
        max_draft: int = 0,
    ) -> None:
        self.config = config
        cache = CacheManager(config.cache, config.scheduler.max_num_batched_tokens)
        self.scheduler = Scheduler(
            config.scheduler,
            cache,
            eos=config.model.eos_token_ids,
            seed=config.seed,
            constraints=constraints,
            proposer=proposer,
            max_draft=max_draft,
        )
        self._executor: Executor = executor if executor is not None else InlineExecutor(config)
        self._ahead: Sampled | None = None
        self._follows = False
        """The step in flight was launched while another was: a device idle before it waited for the host."""
        self._failures = 0
        self._waited = 0.0

    def load(self, progress: Progress | None = None) -> None:
        """Loads the model; errors of checkpoint or configuration are ConfigError."""
        self._executor.load(progress)

    def warm_up(self) -> None:
        """Prepares every shape of decode step now instead of when it first comes; for measurements."""
        self._executor.warm_up()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def finish(self, sequences: Iterable[tuple[str, int]]) -> None:
        """Ends sequences (request id, index; -1 for all of a request); no delta answers."""
        for request_id, index in sequences:
            self.scheduler.finish(request_id, index)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    @property
    def stats(self) -> Stats:
        """A copy of the counters with the gauges of this moment."""
        return self.scheduler.snapshot()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False while any block is in use."""
        return self.scheduler.cache.pool.forget_all()

    def step(self) -> list[Delta]:
        """One turn of the loop. A step that fails ends its own requests with an error.

        Raises EngineDead when steps keep failing.
        """
        began, waited = time.perf_counter(), self._waited
        try:
            deltas = self._turn()
        except Exception as error:
            logger.exception("a step failed; its requests end with an error")
            self._failures += 1
            self._ahead = None
            if self._failures >= MAX_FAILURES:
                raise EngineDead(f"{self._failures} steps failed in a row, the last with: {error!r}") from error
            return self.scheduler.fail(f"the step failed: {error!r}")
        self.scheduler.stats.host_seconds += time.perf_counter() - began - (self._waited - waited)
        return deltas

    def _turn(self) -> list[Delta]:
        deltas: list[Delta] = []
        plan = self.scheduler.schedule(time.time())
        sample = None if plan is None else self._executor.launch(plan)
        follows = self._ahead is not None
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            deltas += self._commit(ahead)
        if sample is not None:
            step = sample(None)
            if self.config.scheduler.overlap:
                self._ahead, self._follows = step, follows
            else:
                deltas += self._commit(step)
        return deltas

    def _commit(self, step: Sampled) -> list[Delta]:
        began = time.perf_counter()
        result = step.result()
        self._waited += time.perf_counter() - began
        self._failures = 0
        stats = self.scheduler.stats
        stats.device_busy_seconds += result.busy_seconds
        if self._follows:
            stats.device_idle_seconds += result.idle_seconds
        return self.scheduler.commit(result, time.time())

    def close(self) -> None:
        """Ends all sequences; the step in flight is waited for."""
        for seq in list(self.scheduler.sequences()):
            self.scheduler.finish(seq.request.id, seq.index)
        while self._ahead is not None:
            self.step()
