"""A hypothesis state machine drives scheduler, pool and an echo worker through arrivals, aborts and steps.

After every rule the scheduler's invariants hold: no leaked block or row, no block owned twice, first come first served,
every request ends exactly once, and what was generated is what a computation without cache gives.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request
from octavo.core.sequence import Status
from tests.support.drive import Driver
from tests.support.echo import naive, salt_of

VOCAB = 6
MAX_LEN = 24
WINDOWS: list[list[int | None]] = [[None], [5], [None, 5], [3, None, 7]]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        windows=st.sampled_from(WINDOWS),
        spare=st.integers(0, 12),
        budget=st.integers(1, 9),
        max_seqs=st.integers(1, 4),
        overlap=st.integers(0, 1),
        stages=st.sampled_from([1, 1, 3]),
        prefix=st.booleans(),
        draft=st.sampled_from([0, 0, 2]),
    )
    def start(
        self,
        windows: list[int | None],
        spare: int,
        budget: int,
        max_seqs: int,
        overlap: int,
        stages: int,
        prefix: bool,
        draft: int,
    ) -> None:
        self.windows = windows
        self.driver = Driver(
            windows=windows,
            num_blocks=1 + len(windows) * (MAX_LEN // 4 + spare),
            budget=budget,
            max_seqs=max_seqs,
            max_len=MAX_LEN,
            overlap=overlap,
            stages=stages,
            prefix_caching=prefix,
            max_draft=draft,
            vocab=VOCAB,
            eos=(0,),
        )
        self.requests: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()
        self.aborted: set[tuple[str, int]] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        n=st.sampled_from([1, 1, 3]),
        tokens=st.integers(1, 10),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        whole=st.booleans(),
    )
    def arrive(self, prompt: list[int], n: int, tokens: int, seed: int, ignore_eos: bool, whole: bool) -> None:
        params = SamplingParams(n=n, temperature=float(seed % 2), seed=seed, max_tokens=tokens, ignore_eos=ignore_eos)
        request = Request(str(len(self.requests)), prompt, params, 0.0, whole=whole)
        self.requests[request.id] = request
        for index in range(n):
            self.got[request.id, index] = []
        self.driver.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.integers(-1, self.requests[request].params.n - 1))
        told = self.driver.scheduler.finish(request, index)
        for delta in told:
            key = (delta.request_id, delta.index)
            assert self.requests[request].whole
            assert delta.finish_reason == "abort"
            assert delta.token_ids == self._wanted(key)[: len(delta.token_ids)]
        which = range(self.requests[request].params.n) if index == -1 else [index]
        self.aborted.update((request, i) for i in which if (request, i) not in self.ended)

    @rule(turns=st.integers(1, 8))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self._take(self.driver.turn())
            self.driver.scheduler.check()

    @rule()
    def forget(self) -> None:
        self.driver.scheduler.cache.pool.forget()

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ended, "a delta after the end"
            assert key not in self.aborted, "a delta after an abort"
            self.got[key] += delta.token_ids
            if delta.finish_reason is not None:
                self.ended.add(key)
                assert self.got[key] == self._wanted(key)
            else:
                assert self.got[key] == self._wanted(key)[: len(self.got[key])]

    def _wanted(self, key: tuple[str, int]) -> list[int]:
        request = self.requests[key[0]]
        params = request.params
        assert params.max_tokens is not None
        assert params.seed is not None
        salt = salt_of(params, params.seed + key[1])
        tokens = naive(request.prompt_token_ids, params.max_tokens, self.windows, salt, VOCAB)
        return tokens if params.ignore_eos or 0 not in tokens else tokens[: tokens.index(0) + 1]

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "driver"):
            return
        scheduler = self.driver.scheduler
        scheduler.check()
        started = [s.order for s in scheduler.sequences() if s.scheduled_at or s.status is Status.RUNNING]
        leaders_waiting = [
            s.order
            for s in scheduler.sequences()
            if s.leader is None and s.status is Status.WAITING and not s.num_generated and s.order not in started
        ]
        firsts = [s.order for s in scheduler.sequences() if s.leader is None and s.status is Status.RUNNING]
        assert not firsts or not leaders_waiting or max(firsts) < min(leaders_waiting), "not first come first served"

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self._take(self.driver.run())
        assert self.ended | self.aborted == set(self.got), "a request never ended"
        assert self.driver.scheduler.cache.pool.num_used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=80, deadline=None)
