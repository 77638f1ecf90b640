"""The engine: scheduler and worker joined by a loop that runs at most one step ahead.

Owns the order of launching, committing and sampling, and what happens when a step fails. Does not know sockets (`loop`)
or text (`frontend`).

With overlap 1, step N+1 is planned and launched before step N's tokens reach the host:

    host    | schedule N+1 | forward N+1 | commit N, masks N+1 | sample N+1 | schedule N+2 | ...
    device  | ..forward N.......sample N | forward N+1 .................................| sample N+1 | ...
                                         ^ N's tokens arrive; they lie in the row state, where N+1 reads them

Masks of grammars need the tokens before, which the host has after the commit; the forward pass runs meanwhile. With
overlap 0 each step is committed before the next is planned. With P stages of a pipeline P - 1 steps more are in flight,
of different rows each (see `scheduler`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from octavo.cache import CacheManager
from octavo.config.engine import EngineConfig
from octavo.core.errors import EngineDead
from octavo.core.request import Delta, Request, Stats
from octavo.engine.executor import Executor, Progress, Sampled, executor_for
from octavo.scheduler import Constraint, Proposer, Scheduler
from octavo.structured import Grammars, Vocabulary

logger = logging.getLogger("octavo")
MAX_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""
GRAMMAR_WAIT = 0.005
"""Seconds that a turn with nothing else to do waits for a grammar; requests that arrive meanwhile wait as long."""


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
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`vocabulary` is the model's tokenizer for grammars where the process has one; by default it is read."""
        self.config = config
        self._vocabulary = vocabulary
        cache = CacheManager(config.cache, config.scheduler.max_num_batched_tokens)
        self._grammars = Grammars(self._open_vocabulary, config.model.vocab_size)
        self.scheduler = Scheduler(
            config.scheduler,
            cache,
            eos=config.model.eos_token_ids,
            seed=config.seed,
            constraints=(self._grammars, *constraints),
            proposer=proposer,
            max_draft=max_draft,
        )
        self._executor: Executor = executor if executor is not None else executor_for(config)
        self._ahead: deque[tuple[Sampled, bool]] = deque()
        """Steps in flight, oldest first. True: launched while another was; a device idle before waited for the host."""
        self._depth = config.scheduler.depth
        """Steps that stay in flight from turn to turn."""
        self._failures = 0
        self._waited = 0.0

    def load(self, progress: Progress | None = None) -> None:
        """Loads the model; errors of checkpoint or configuration are ConfigError."""
        self._executor.load(progress)

    def warm_up(self) -> None:
        """Prepares every shape of decode step now instead of when it first comes; for measurements."""
        self._executor.warm_up()

    def prepare_vocabulary(self) -> None:
        """Starts a thread that prepares the vocabulary, so that the first grammar need not wait for it."""
        if self.config.tokenizer is not None:
            self._grammars.prepare_vocabulary()

    def _open_vocabulary(self) -> Vocabulary:
        """The model's tokenizer for grammars."""
        from octavo.text import load_tokenizer

        if self._vocabulary is not None:
            return self._vocabulary
        model = self.config.model
        if self.config.tokenizer is None:
            raise ValueError("structured output needs the tokenizer, which skip_tokenizer_init left out")
        return Vocabulary(load_tokenizer(Path(self.config.tokenizer)), model.vocab_size, model.eos_token_ids)

    def add(self, request: Request) -> None:
        if request.grammar:
            self._grammars.prepare(request.grammar)
        self.scheduler.add(request)

    def finish(self, sequences: Iterable[tuple[str, int]]) -> list[Delta]:
        """Ends sequences (request id, index; -1 for all of a request); only `whole` ones have deltas left to tell."""
        return [delta for ended in sequences for delta in self.scheduler.finish(*ended)]

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    @property
    def stats(self) -> Stats:
        """A copy of the counters with the gauges of this moment."""
        return self.scheduler.snapshot()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False while any block is in use."""
        pool = self.scheduler.cache.pool
        if pool.num_used:
            return False
        pool.forget()
        return True

    def step(self) -> list[Delta]:
        """One turn of the loop. A step that fails ends its own requests with an error.

        Raises EngineDead when steps keep failing.
        """
        began, waited = time.perf_counter(), self._waited
        try:
            deltas = self._turn()
        except EngineDead:
            raise
        except Exception as error:
            logger.exception("a step failed; its requests end with an error")
            self._failures += 1
            self._ahead.clear()
            if self._failures >= MAX_FAILURES:
                raise EngineDead(f"{self._failures} steps failed in a row, the last with: {error!r}") from error
            return self.scheduler.fail(f"the step failed: {error!r}")
        self.scheduler.stats.host_seconds += time.perf_counter() - began - (self._waited - waited)
        return deltas

    def _turn(self) -> list[Delta]:
        deltas: list[Delta] = []
        plan = self.scheduler.schedule(time.time())
        sample = None if plan is None else self._executor.launch(plan)
        if sample is None and not self._ahead:
            self._grammars.wait(GRAMMAR_WAIT)
        follows = bool(self._ahead)
        if self._ahead and (sample is None or len(self._ahead) == self._depth):
            deltas += self._commit(*self._ahead.popleft())
        if sample is not None:
            masks, failed = self._grammars.masks(self.scheduler.newest())
            deltas += [self.scheduler.refuse(seq, error) for seq, error in failed]
            self._ahead.append((sample(masks), follows))
            if not self._depth:
                deltas += self._commit(*self._ahead.popleft())
        return deltas

    def _commit(self, step: Sampled, follows: bool) -> list[Delta]:
        began = time.perf_counter()
        result = step.result()
        self._waited += time.perf_counter() - began
        self._failures = 0
        stats = self.scheduler.stats
        stats.device_busy_seconds += result.busy_seconds
        if follows:
            stats.device_idle_seconds += result.idle_seconds
        return self.scheduler.commit(result, time.time())

    def close(self) -> None:
        """Ends all sequences and the executor; the step in flight is waited for."""
        for seq in list(self.scheduler.sequences()):
            self.scheduler.finish(seq.request.id, seq.index)
        try:
            while self._ahead:
                self.step()
        finally:
            self._executor.close()
        self._grammars.close()
