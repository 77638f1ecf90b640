"""Follows the grammar of every running sequence and says which tokens may come next.

Grammars are compiled in a thread; until one is ready its sequences wait, by the scheduler's own rule for constraints. A
matcher reads what its sequence has been given since it was last asked, so nothing needs to tell it: preemption and
running ahead change neither tokens nor their order. Errors belong to the sequence whose grammar they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from octavo.core.plan import Masks
from octavo.core.sequence import Sequence
from octavo.structured.grammar import new_matcher

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from octavo.structured.tokens import Vocabulary

T = TypeVar("T")
MAX_COMPILED = 64
"""Compiled grammars that are kept for the next request with the same one."""


class _Follower:
    """One sequence's place in its grammar: a matcher once the grammar is compiled, and how many tokens it has read."""

    def __init__(self, compiled: Future[LLMatcher], start: int) -> None:
        self.compiled = compiled
        self.matcher: LLMatcher | None = None
        self.read = start

    def follow(self, tokens: list[int]) -> LLMatcher:
        """The matcher after all tokens. Raises what compiling raised, ValueError when the grammar is broken."""
        if self.matcher is None:
            self.matcher = self.compiled.result().deep_copy()
        new = tokens[self.read :]
        if new:
            self.matcher.consume_tokens(new)
            self.read += len(new)
        self.check()
        return self.matcher

    def check(self) -> None:
        if self.matcher is not None and self.matcher.is_error():
            raise ValueError(self.matcher.get_error()[:300])


class Grammars:
    """The grammars of an engine's sequences; a scheduler's Constraint.

    `open_vocabulary` is called in a thread, until it has returned once: by `prepare_vocabulary` or the first grammar.

    Belongs to the engine's thread.
    """

    def __init__(self, open_vocabulary: Callable[[], Vocabulary], vocab_size: int) -> None:
        self._open = open_vocabulary
        self._words = -(-vocab_size // 32)
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._followers: dict[Sequence, _Follower] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pool: LLExecutor | None = None

    def prepare_vocabulary(self) -> None:
        """Starts what would otherwise delay the first grammar. Where that fails, the first grammar says why."""
        self._in_thread(lambda: self._opened().prepare())

    def prepare(self, grammar: str) -> Future[LLMatcher]:
        """Starts compiling a grammar, unless it is known."""
        found = self._compiled.get(grammar)
        if found is None:
            found = self._compiled[grammar] = self._in_thread(lambda: self._matcher(grammar))
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return found

    def _matcher(self, grammar: str) -> LLMatcher:
        """A matcher that has computed its first mask, the costliest: copies share what it learned of the vocabulary."""
        matcher = new_matcher(grammar, self._opened())
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher

    def _in_thread(self, work: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "octavo-grammar")
        return self._thread.submit(work)

    def _opened(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._open()
        return self._vocabulary

    def fits(self, seq: Sequence) -> bool:
        """Whether the sequence's grammar, if it has one, is ready."""
        grammar = seq.request.grammar
        if not grammar:
            return True
        follower = self._followers.get(seq)
        if follower is None:
            follower = self._followers[seq] = _Follower(self.prepare(grammar), seq.prompt_len)
        return follower.compiled.done()

    def wait(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for a grammar that is being compiled."""
        pending = [kept.compiled for seq, kept in self._followers.items() if not (seq.finished or kept.compiled.done())]
        if pending:
            wait(pending, timeout, FIRST_COMPLETED)

    def masks(self, sampled: Iterable[Sequence]) -> tuple[Masks | None, list[tuple[Sequence, str]]]:
        """Which tokens the rows of a step may choose, and the sequences that cannot go on, with the reason.

        `sampled` are the step's sampled sequences in order; all of their tokens before the step are known.
        """
        if not self._followers:
            return None, []
        self._followers = {seq: kept for seq, kept in self._followers.items() if not seq.finished}
        lines: list[int] = []
        matchers: list[LLMatcher] = []
        rows: list[Sequence] = []
        failed: list[tuple[Sequence, str]] = []
        for line, seq in enumerate(sampled):
            follower = self._followers.get(seq)
            if follower is None:
                continue
            try:
                matchers.append(follower.follow(seq.tokens))
            except Exception as error:
                failed.append((seq, _failure(error)))
            else:
                lines.append(line)
                rows.append(seq)
        if not rows:
            return None, failed
        bits = self._fill(matchers)
        for seq in rows:
            try:
                self._followers[seq].check()
            except ValueError as error:
                failed.append((seq, _failure(error)))
        return Masks(np.array(lines, np.int32), bits), failed

    def _fill(self, matchers: list[LLMatcher]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        from llguidance import LLExecutor

        if self._pool is None:
            self._pool = LLExecutor()
        bits = np.zeros((len(matchers), self._words), np.int32)
        targets = list(zip(matchers, range(len(matchers)), strict=True))
        self._pool.unsafe_compute_mask_ptr(targets, bits.ctypes.data, self._words * 4, len(matchers))
        return bits

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _failure(error: Exception) -> str:
    return f"the grammar cannot be followed: {error}"
