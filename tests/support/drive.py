"""Drives a scheduler with a worker the way the engine's loop does, for tests."""

from __future__ import annotations

from collections import deque

from octavo.cache import CacheManager
from octavo.config.engine import CacheConfig, SchedulerConfig
from octavo.config.kv import KVGroup
from octavo.core.plan import Plan, StepResult, decode_plan, encode_plan
from octavo.core.request import Delta
from octavo.core.sequence import Sequence
from octavo.scheduler import Scheduler
from tests.support.echo import EchoWorker, naive, salt_of


def groups_of(windows: list[int | None]) -> tuple[KVGroup, ...]:
    return tuple(KVGroup(i, (i,), window) for i, window in enumerate(windows))


class OracleProposer:
    """Drafts the true continuation, spoilt at every `spoil`-th position, so that some drafts are rejected."""

    def __init__(self, windows: list[int | None], vocab: int, spoil: int) -> None:
        self.windows, self.vocab, self.spoil = windows, vocab, spoil

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        salt = salt_of(seq.params, seq.seed)
        draft = naive(seq.tokens, limit, self.windows, salt, self.vocab)
        at = len(seq.tokens)
        return [(t + 1) % self.vocab if (at + i) % self.spoil == 0 else t for i, t in enumerate(draft)]


class Driver:
    """Scheduler, pool and echo worker; `turn` is one turn of the engine's loop."""

    def __init__(
        self,
        *,
        windows: list[int | None],
        num_blocks: int,
        block_size: int = 4,
        budget: int = 16,
        max_seqs: int = 4,
        max_len: int = 64,
        overlap: int = 0,
        stages: int = 1,
        prefix_caching: bool = True,
        max_draft: int = 0,
        vocab: int = 50,
        eos: tuple[int, ...] = (),
    ) -> None:
        groups = groups_of(windows)
        cache = CacheConfig(
            block_size=block_size, num_blocks=num_blocks, prefix_caching=prefix_caching, dtype="float32", groups=groups
        )
        config = SchedulerConfig(
            max_num_seqs=max_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_len,
            overlap=1 if overlap else 0,
            stages=stages,
        )
        proposer = OracleProposer(windows, vocab, 3) if max_draft else None
        manager = CacheManager(cache, budget)
        self.scheduler = Scheduler(config, manager, eos=eos, proposer=proposer, max_draft=max_draft)
        self.worker = EchoWorker(groups, block_size, num_blocks, vocab)
        self.depth = config.depth
        """Steps that stay in flight from turn to turn."""
        self.plans: list[Plan] = []
        self._ahead: deque[StepResult] = deque()

    def turn(self) -> list[Delta]:
        plan = self.scheduler.schedule(now=1.0)
        launched = None
        if plan is not None:
            plan = decode_plan(encode_plan(plan))
            self.plans.append(plan)
            launched = self.worker.execute(plan)
        deltas: list[Delta] = []
        if self._ahead and (launched is None or len(self._ahead) == self.depth):
            deltas += self.scheduler.commit(self._ahead.popleft())
        if launched is not None:
            self._ahead.append(launched)
            if not self.depth:
                deltas += self.scheduler.commit(self._ahead.popleft())
        return deltas

    def run(self, limit: int = 10_000) -> list[Delta]:
        deltas: list[Delta] = []
        for _ in range(limit):
            if not self.scheduler.has_work():
                return deltas
            deltas += self.turn()
            self.scheduler.check()
        raise AssertionError("the scheduler makes no progress")
