"""Host truth of one generation. The scheduler and, for blocks, the cache manager are its only writers.

A request of n choices is n sequences. A sequence knows how far its KV has come (`num_computed`) and how many tokens
there are (`known`: `tokens`, plus those in flight); all that the scheduler does is close that gap. Those that gain one
of both in every step can ride with a common clock, so that no step has to count for each of them.
"""

from __future__ import annotations

from enum import Enum

from octavo.core.request import FinishReason, Request, TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Clock:
    """Counts the tokens that all who ride with it have gained."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


STILL = Clock()
"""Stands: the clock of sequences that ride with none."""


class Sequence:
    """One choice of one request."""

    __slots__ = (
        "_clock", "_computed", "_known", "blocks", "cached_tokens", "capacity", "detailed", "digests", "draft",
        "finish_reason", "first_token_at", "identity", "index", "kept_logprobs", "last_in_row", "leader", "limit",
        "order", "params", "planned", "prompt_len", "prompt_logprobs", "published", "quiet", "request", "row",
        "scheduled_at", "seed", "status", "stop_ids", "tokens", "whole",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        index: int,
        order: int,
        seed: int,
        eos: frozenset[int],
        identity: bytes | None,
        leader: Sequence | None,
    ) -> None:
        params = request.params
        assert params.max_tokens is not None
        self.request = request
        self.index = index
        self.order = order
        self.seed = seed
        self.params = params
        self.tokens: list[int] = list(request.prompt_token_ids)
        """Prompt and accepted output, as known on the host."""
        self.prompt_len = len(self.tokens)
        self.limit = self.prompt_len + params.max_tokens
        ends = frozenset() if params.ignore_eos else eos
        self.stop_ids = ends.union(params.stop_token_ids or ())
        self.leader = leader
        """The request's first sequence, whose prompt blocks this one shares; None for the first."""
        self.status = Status.WAITING
        self.row: int | None = None
        self.last_in_row = False
        """The row's state holds, or will when the step in flight ends, the last token."""
        self._clock = STILL
        self._computed = 0
        self._known = self.prompt_len
        self.planned = 0
        """Number of the step that samples for it and was planned last; not kept up while it rides."""
        self.draft: list[int] = []
        """Proposed tokens being verified in flight."""
        self.blocks: list[list[int]] = []
        """Per KV group the block ids in order of position; 0 where freed behind a window."""
        self.identity = identity
        """Root of the chain of block digests; None: blocks are never shared."""
        self.digests: list[bytes] = []
        self.published = 0
        """Leading blocks that are in the prefix cache."""
        self.capacity = 0
        """Tokens that the block tables have slots for."""
        self.whole = request.whole
        self.detailed = params.logprobs is not None
        """Its tokens come with log-probabilities."""
        self.quiet = self.whole and not self.detailed
        """Nothing is told or kept of a token that does not end it."""
        self.cached_tokens = 0
        self.scheduled_at = 0.0
        self.first_token_at = 0.0
        self.kept_logprobs: list[TokenLogprobs] = []
        """Of a `whole` request, until its end."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self.finish_reason: FinishReason | None = None

    def ride(self, clock: Clock) -> None:
        """From now on `num_computed` and `known` advance with `clock`."""
        gained = self._clock.now - clock.now
        self._computed += gained
        self._known += gained
        self._clock = clock

    def gain(self) -> None:
        """One token of each more."""
        self._computed += 1
        self._known += 1

    @property
    def riding(self) -> bool:
        return self._clock is not STILL

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is written or scheduled to be."""
        return self._computed + self._clock.now

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        self._computed = count - self._clock.now

    @property
    def known(self) -> int:
        """Tokens there are, one for each step in flight that samples for this sequence counted in."""
        return self._known + self._clock.now

    @known.setter
    def known(self, count: int) -> None:
        self._known = count - self._clock.now

    @property
    def inflight(self) -> int:
        """Steps launched that sample for this sequence and are not committed."""
        return self.known - len(self.tokens)

    @property
    def todo(self) -> int:
        """The gap: tokens known or in flight whose KV is not scheduled."""
        return self.known - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Prompt log-probabilities are asked for and not complete; only a request's first sequence makes them."""
        return self.prompt_logprobs is not None and self.index == 0 and len(self.prompt_logprobs) < self.prompt_len
