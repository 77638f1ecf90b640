"""Who computes what in the next step.

One rule: a sequence has `num_computed` tokens with KV and `todo` tokens without; every step closes as much of the gaps
as the token budget and the pool allow. Chunked prefill, prefix hits, recompute after preemption, verification of drafts
and running one step ahead all follow from it; there is no prefill phase.

Order within a step: sequences one token short (decode), then running ones with longer gaps, then waiting ones first
come first served, then drafts with what is left. When the pool runs dry, the latest arrival that the step does not hold
yet is preempted: it gives up its blocks and waits, before all newcomers, to recompute (mostly from the prefix cache).

Rules of running ahead that live here:
- `schedule` needs counts only, never the tokens of the step in flight; a finished sequence's late tokens are dropped.
- Prompt blocks are published when they are scheduled (all KV writes of a layer precede its attention, so even the same
  step may share them), generated ones some at a time when another block is asked for, and the rest when their sequence
  leaves; `fail` forgets them all.
- With P stages a plan takes its share of the running sequences, and P plans take turns: P of them, of different rows,
  fill the pipeline, and ahead of it only the next plan of the oldest one's rows is launched.
- A preempted sequence with a token in flight is not readmitted before the token has arrived; one whose drafts are being
  verified is not scheduled before the result.

Owns sequences, rows and their order. Does not know the clock (`now` is passed in), tensors, text or sockets.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter
from random import Random

import msgspec

from octavo.cache import CacheManager
from octavo.config.engine import SchedulerConfig
from octavo.core.plan import Admit, Plan, StepResult
from octavo.core.request import Delta, FinishReason, Request, Stats, TokenLogprobs
from octavo.core.sequence import Sequence, Status
from octavo.scheduler.riders import SOON, Crew, Riders
from octavo.scheduler.seams import Constraint, Proposer, SiblingsShare
from octavo.scheduler.step import Inflight, StepBuilder

_UINT64 = 2**64


class Scheduler:
    """Plans steps and takes in their results. `eos` ends a sequence unless it ignores it."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        *,
        eos: Iterable[int] = (),
        seed: int = 0,
        constraints: Iterable[Constraint] = (),
        proposer: Proposer | None = None,
        max_draft: int = 0,
    ) -> None:
        self.config = config
        self.cache = cache
        self.stats = Stats(kv_blocks_total=cache.pool.num_blocks - 1)
        self._eos = frozenset(eos)
        self._random = Random(seed)
        self._constraints: list[Constraint] = [SiblingsShare(cache.block_size), *constraints]
        self._proposer = proposer
        self._max_draft = max_draft
        self._requests: dict[str, list[Sequence]] = {}
        self._running: list[Sequence] = []
        """In order of arrival."""
        self._preempted: list[Sequence] = []
        """In order of arrival; before all of `_waiting`."""
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._retire: list[int] = []
        self._rewind: dict[int, int] = {}
        self._riders = Riders()
        self._rides = proposer is None and config.stages == 1
        """Else who goes on is decided anew for each step."""
        self._inflight: deque[Inflight] = deque()
        self._order = 0
        self._steps = 0

    # Arrivals and departures

    def add(self, request: Request) -> None:
        """Queues the sequences of a request whose id is not in use."""
        assert request.id not in self._requests, f"request id {request.id} is in use"
        params = request.params
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        identity = self.cache.identity(request.id, request.cache_salt, params.n > 1)
        sequences: list[Sequence] = []
        for index in range(params.n):
            wrapped = (seed + index + _UINT64 // 2) % _UINT64 - _UINT64 // 2
            leader = sequences[0] if sequences else None
            seq = Sequence(request, index, self._order, wrapped, self._eos, identity, leader)
            sequences.append(seq)
            self._waiting[self._order] = seq
            self._order += 1
        self._requests[request.id] = sequences

    def finish(self, request_id: str, index: int = -1) -> list[Delta]:
        """Ends a sequence (-1: all of a request) on the frontend's word; unknown or ended ones are ignored.

        The deltas are those of a `whole` request, of which nothing has been told yet.
        """
        ended = [s for s in self._requests.get(request_id, ()) if index in (-1, s.index) and not s.finished]
        for seq in ended:
            self._end(seq, "abort")
        return [_whole(seq, "abort") for seq in ended if seq.whole]

    def has_work(self) -> bool:
        return bool(self._requests) or bool(self._inflight)

    def sequences(self) -> Iterator[Sequence]:
        """All sequences that have not ended."""
        return (seq for seqs in self._requests.values() for seq in seqs if not seq.finished)

    # Planning

    def schedule(self, now: float = 0.0) -> Plan | None:
        """The next step, or None when nothing can run before a step in flight is committed."""
        step = StepBuilder(self._steps + 1, self.config.max_num_batched_tokens)
        preemptions = self.stats.preemptions
        longer = self._close_decode(step)
        self._close_longer(step, longer)
        if self.stats.preemptions == preemptions:
            self._admit_waiting(step, now)
        if self._proposer is not None:
            self._add_drafts(step)
        if step.empty:
            return None
        self._steps += 1
        plan = step.plan(self._retire, list(self._rewind.items()))
        self._retire, self._rewind = [], {}
        self._inflight.append(step.inflight())
        self._count_step()
        return plan

    def newest(self) -> list[Sequence]:
        """The sequences that the step planned last samples, in the order of its rows."""
        return self._inflight[-1].sampled

    def _close_decode(self, step: StepBuilder) -> list[Sequence]:
        """Schedules the sequences that are one token short; returns the other running ones."""
        riders, longer = self._riders, []
        attend = riders.due()
        if len(riders) < len(self._running):
            most = min(step.budget, -(-len(self._running) // self.config.stages)) - len(riders)
            ready: list[Sequence] = []
            for seq in self._running:
                if not seq.last_in_row:
                    longer.append(seq)
                elif len(ready) < most and not seq.riding and seq.known < seq.limit and not self._waits(seq):
                    ready.append(seq)
            attend = sorted(attend + ready, key=attrgetter("order"))
        for seq in attend:
            if seq.row is not None:  # else preempted for one before it
                self._attend(step, seq)
        if self._rides:
            step.take(riders.advance())
        else:
            for seq in step.attended:
                seq.gain()
                seq.planned = step.number
            step.take(Crew.of(step.attended))
        self.cache.computed += len(step.decode)
        return longer

    def _attend(self, step: StepBuilder, seq: Sequence) -> None:
        """Makes room for the token that a sequence is short; it may ride on until it needs a block or is at its end."""
        computed = seq.num_computed
        left = seq.limit - 1 - computed  # tokens to sample
        soon = min(left, SOON)
        if soon <= 0 or (seq.capacity - computed < soon and not self._make_room(step, seq, soon, 1)):
            self._riders.remove(seq)
            return
        if left == 1:
            step.ending.append(seq)
        step.attended.append(seq)
        if self._rides:
            room = seq.capacity - computed
            self._riders.add(seq, room if room < left else max(left - 1, 1))

    def _close_longer(self, step: StepBuilder, sequences: list[Sequence]) -> None:
        """Schedules what the budget holds of longer gaps."""
        for seq in sequences:
            if not step.budget:
                break
            count = min(seq.todo, step.budget)
            if seq.status is Status.RUNNING and self._make_room(step, seq, count, count):
                self._place(step, seq, count)

    def _waits(self, seq: Sequence) -> bool:
        """Its drafts are being verified, the proposer needs the token in flight, or it is other rows' turn."""
        if seq.draft or not seq.inflight:
            return bool(seq.draft)
        return self._may_draft(seq) or self._steps + 1 < seq.planned + self.config.stages

    def _may_draft(self, seq: Sequence) -> bool:
        return self._max_draft > 0 and not seq.params.uses_history and not seq.request.grammar

    def _make_room(self, step: StepBuilder, seq: Sequence, count: int, least: int) -> bool:
        """Grows the block tables by `count` tokens, or `least` where nothing is free for more.

        False when the pool is dry and `seq` waits or was preempted.
        """
        self.cache.publish(seq, self.cache.together)
        self.cache.leave_behind(seq)
        grow, computed = self.cache.grow, seq.num_computed
        while (new := grow(seq, computed + count) or grow(seq, computed + least)) is None:
            placed = {*step.attended, *step.members()}
            victim = next((s for s in reversed(self._running) if s not in placed), None)
            if victim is None:
                return False
            assert len(self._running) > 1, "the pool holds one sequence of full length"
            self._preempt(victim)
            if victim is seq:
                return False
        step.add_blocks(seq, new)
        return True

    def _place(self, step: StepBuilder, seq: Sequence, count: int) -> None:
        """Puts a chunk of `count` tokens into the step."""
        start = seq.num_computed
        seq.num_computed += count
        self.cache.computed += count
        step.budget -= count
        if seq.todo == 0:
            seq.last_in_row = True
            seq.known += 1
            seq.planned = step.number
            step.closing.append((seq, start))
        else:
            step.open.append((seq, start))
        self.cache.publish(seq)

    def _admit_waiting(self, step: StepBuilder, now: float) -> None:
        reserved = sum(self.cache.pages_to_complete(seq, len(seq.blocks[0])) for seq, _ in step.open)
        admitted: list[Sequence] = []
        for seq in chain(self._preempted, self._waiting.values()):
            if step.budget == 0 or not self._free_rows:
                break
            if seq.inflight or not all(constraint.fits(seq) for constraint in self._constraints):
                continue
            hit = 0 if seq.wants_prompt_logprobs else self.cache.find(seq)
            spare = reserved + (self.cache.pool.num_blocks // 100 if self._running else 0)
            if not self.cache.can_admit(seq, hit, spare):
                break
            self._admit(step, seq, hit, now)
            admitted.append(seq)
            if seq.todo:
                reserved += self.cache.pages_to_complete(seq, len(seq.blocks[0]))
        for seq in admitted:
            if self._waiting.pop(seq.order, None) is None:
                self._preempted.remove(seq)
            insort(self._running, seq, key=lambda s: s.order)

    def _admit(self, step: StepBuilder, seq: Sequence, hit: int, now: float) -> None:
        seq.row = self._free_rows.pop()
        seq.status = Status.RUNNING
        cached = self.cache.admit(seq, hit)
        if not seq.scheduled_at:
            seq.scheduled_at = now
            seq.cached_tokens = seq.num_computed
            self.stats.prefix_queries += seq.prompt_len
            self.stats.prefix_hits += seq.num_computed
            self.stats.prompt_tokens += seq.prompt_len if seq.index == 0 else 0
        wants_prompt = seq.wants_prompt_logprobs
        params = seq.params if wants_prompt else seq.params.replace(prompt_logprobs=None)
        step.admit.append(
            Admit(
                row=seq.row,
                params=params,
                seed=seq.seed,
                prompt_len=seq.prompt_len,
                num_tokens=len(seq.tokens),
                num_computed=seq.num_computed,
                history=list(seq.tokens) if seq.params.uses_history or wants_prompt else None,
                bad_word_ids=seq.request.bad_word_ids,
            )
        )
        count = min(seq.todo, step.budget)
        grown = self.cache.grow(seq, seq.num_computed + count)
        assert grown is not None, "can_admit promised the pages"
        step.add_blocks(seq, cached + grown)
        self._place(step, seq, count)

    def _add_drafts(self, step: StepBuilder) -> None:
        """Moves decode rows whose next tokens the proposer guesses to the drafted ones, as budget and pool allow."""
        assert self._proposer is not None
        decode = []
        for seq in step.decode:
            room = min(self._max_draft, step.budget, seq.limit - len(seq.tokens) - 1)
            draft = self._proposer.propose(seq, room) if room > 0 and self._may_draft(seq) else []
            new = self.cache.grow(seq, seq.num_computed + len(draft)) if draft else None
            if new is None:
                decode.append(seq)
                continue
            step.add_blocks(seq, new)
            step.budget -= len(draft)
            seq.draft = draft
            seq.num_computed += len(draft)
            self.cache.computed += len(draft)
            step.drafted.append(seq)
        step.crew = Crew.of(decode)

    def _preempt(self, seq: Sequence) -> None:
        self.stats.preemptions += 1
        self.cache.publish(seq)
        self._leave(seq)
        seq.status = Status.WAITING
        insort(self._preempted, seq, key=lambda s: s.order)

    def _leave(self, seq: Sequence) -> None:
        """Takes row and blocks from a running sequence."""
        assert seq.row is not None
        self._riders.remove(seq)
        self.cache.release(seq)
        self._running.remove(seq)
        self._free_rows.append(seq.row)
        self._retire.append(seq.row)
        self._rewind.pop(seq.row, None)
        seq.row = None
        seq.last_in_row = False
        seq.draft = []

    # Results

    def commit(self, result: StepResult, now: float = 0.0) -> list[Delta]:
        """Takes in the oldest step in flight: tokens are appended, ended sequences leave."""
        step = self._inflight.popleft()
        deltas: list[Delta] = []
        for i, (position, entries) in result.prompt_logprobs.items():
            known = step.members[i].prompt_logprobs
            if known is not None:
                known[position:] = entries
        crew, tokens = step.crew, result.tokens[:, 0].tolist()
        for seq, token in zip(step.members, tokens, strict=False):
            seq.tokens.append(token)  # an ended sequence may take one more, which nobody reads
        for i in step.drafted:
            self._settle(step.members[i], result.tokens[i, 1 : result.num_tokens[i]].tolist())
        others = enumerate(step.sampled[len(crew.sequences) :], len(crew.sequences))
        for i, seq in chain(crew.detailed, others):
            deltas += self._tell(seq, int(result.num_tokens[i]), result.logprobs.get(i), now)
        for seq in chain(step.ending, crew.stopped(tokens)):
            deltas += self._tell(seq, 1, None, now)
        deltas += [Delta(s.request.id, s.index, [tokens[i]]) for i, s in crew.streaming if s.finish_reason is None]
        self.stats.generated_tokens += int(result.num_tokens.sum())
        return deltas

    def _settle(self, seq: Sequence, accepted: list[int]) -> None:
        """Takes in accepted drafts, and takes back the KV of rejected ones."""
        seq.tokens += accepted
        seq.known += len(accepted)
        rejected = len(seq.draft) - len(accepted)
        if seq.draft and rejected:
            seq.num_computed -= rejected
            self.cache.computed -= rejected
            assert seq.row is not None, "a sequence that leaves its row leaves its drafts"
            self._rewind[seq.row] = seq.num_computed
        seq.draft = []

    def _tell(self, seq: Sequence, count: int, logprobs: list[TokenLogprobs] | None, now: float) -> list[Delta]:
        """Looks at the last `count` tokens; the first that ends the sequence is its last.

        Nothing to tell of a sequence that has ended, or of a `whole` one before it ends. Sets `first_token_at`.
        """
        if seq.finish_reason is not None:
            return []
        before = len(seq.tokens) - count
        first = not seq.first_token_at
        seq.first_token_at = seq.first_token_at or now or 1.0
        reason: FinishReason | None = None
        stop: int | None = None
        for end, token in enumerate(seq.tokens[before:], before + 1):
            if token in seq.stop_ids:
                reason, stop = "stop", self._stop_reason(seq, token)
            elif end >= seq.limit:
                reason = "length"
            if reason is not None:
                del seq.tokens[end:]
                break
        entries = None if logprobs is None else logprobs[: len(seq.tokens) - before]
        if seq.whole:
            seq.kept_logprobs += entries or ()
            if reason is None:
                return []
            delta = _whole(seq, reason, stop)
        else:
            delta = Delta(seq.request.id, seq.index, seq.tokens[before:], reason, stop, entries)
            if first:
                _begin(delta, seq)
        if reason is not None:
            self._end(seq, reason)
        return [delta]

    def _stop_reason(self, seq: Sequence, token: int) -> int | None:
        """The stop token's id, None for an end-of-sequence token."""
        return None if token in self._eos and not seq.params.ignore_eos else token

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.status is Status.RUNNING:
            if reason != "error":
                self.cache.publish(seq)
            self._leave(seq)
        elif self._waiting.pop(seq.order, None) is None:
            self._preempted.remove(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        siblings = self._requests[seq.request.id]
        if all(s.finished for s in siblings):
            del self._requests[seq.request.id]

    def fail(self, error: str) -> list[Delta]:
        """Ends every sequence of the steps in flight, which did not execute.

        Forgets all cached prefixes: those that have left since may have published what these steps were to write.
        """
        self.cache.pool.forget()
        members = (seq for step in self._inflight for seq in step.members)
        deltas = [self.refuse(seq, error) for seq in members if not seq.finished]
        self._inflight.clear()
        return deltas

    def refuse(self, seq: Sequence, error: str) -> Delta:
        """Ends one sequence with an error of its own; a token of it in flight is dropped."""
        self._end(seq, "error")
        return Delta(seq.request.id, seq.index, [], "error", error=error)

    # Accounts

    def _count_step(self) -> None:
        stats, cache = self.stats, self.cache
        slots = cache.owned * cache.block_size
        stats.steps += 1
        stats.kv_slots_owned += slots
        stats.kv_tokens_held += slots - cache.unused_slots

    def snapshot(self) -> Stats:
        """A copy of the statistics with the gauges of this moment."""
        return msgspec.structs.replace(
            self.stats,
            running=len(self._running),
            waiting=len(self._waiting) + len(self._preempted),
            kv_blocks_used=self.cache.pool.num_used,
        )

    def check(self) -> None:
        """Asserts the invariants that no sequence of calls may break."""
        alive = list(self.sequences())
        self.cache.pool.check([b for b in table if b] for seq in alive for table in seq.blocks)
        rows = [seq.row for seq in self._running if seq.row is not None]
        assert len(rows) == len(self._running) == len(set(rows)), "a running sequence has no row of its own"
        assert sorted(rows + self._free_rows) == list(range(self.config.max_num_seqs)), "a row leaked"
        waiting = [*self._preempted, *self._waiting.values()]
        assert {id(s) for s in alive} == {id(s) for s in [*self._running, *waiting]}, "a sequence is lost"
        assert all(not s.blocks and s.row is None for s in waiting), "a waiting sequence owns something"
        owned = sum(bool(b) for s in alive for table in s.blocks for b in table)
        assert owned == self.cache.owned, "owned entries are miscounted"
        self._riders.check()
        assert self.cache.computed == sum(s.num_computed for s in self._running), "computed tokens are miscounted"
        assert self.cache.capacity == sum(s.capacity for s in self._running), "capacity is miscounted"


def _whole(seq: Sequence, reason: FinishReason, stop: int | None = None) -> Delta:
    """The only delta of a sequence of a `whole` request."""
    tokens, entries = seq.tokens[seq.prompt_len :], seq.kept_logprobs or None
    delta = Delta(seq.request.id, seq.index, tokens, reason, stop, entries, first_token_at=seq.first_token_at)
    _begin(delta, seq)
    return delta


def _begin(delta: Delta, seq: Sequence) -> None:
    """Adds what only a sequence's first delta tells."""
    delta.cached_tokens = seq.cached_tokens
    delta.scheduled_at = seq.scheduled_at
    if seq.index == 0 and not seq.wants_prompt_logprobs:
        delta.prompt_logprobs = seq.prompt_logprobs
