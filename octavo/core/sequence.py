"""Host truth of one generation. The scheduler and, for blocks, the cache manager are its only writers.

A request of n choices is n sequences. A sequence knows how far its KV has come (`num_computed`) and how many tokens
there are (`tokens`, plus those in flight); everything the scheduler does is close that gap.
"""

from __future__ import annotations

from enum import Enum

from octavo.core.request import FinishReason, Request, TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One choice of one request."""

    __slots__ = (
        "blocks", "cached_tokens", "capacity", "digests", "draft", "finish_reason", "first_token_at", "free_until",
        "identity", "index", "inflight", "kept_logprobs", "last_in_row", "leader", "limit", "num_computed", "order",
        "params", "prompt_len", "prompt_logprobs", "published", "quiet", "request", "row", "scheduled_at", "seed",
        "status", "stop_ids", "tokens", "whole",
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
        self.stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else eos)
        self.leader = leader
        """The request's first sequence, whose prompt blocks this one shares; None for the first."""
        self.status = Status.WAITING
        self.row: int | None = None
        self.last_in_row = False
        """The row's state holds, or will when the step in flight ends, the last token."""
        self.num_computed = 0
        """Tokens whose KV is written or scheduled to be."""
        self.inflight = 0
        """Steps launched that sample for this sequence and are not committed."""
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
        self.free_until = 0
        """Below this `num_computed` a step of one token needs no block, is not the last, and has nothing to tell."""
        self.whole = request.whole
        self.quiet = self.whole and not self.stop_ids and params.logprobs is None
        """Nothing that it samples matters before its last token."""
        self.cached_tokens = 0
        self.scheduled_at = 0.0
        self.first_token_at = 0.0
        self.kept_logprobs: list[TokenLogprobs] = []
        """Of a `whole` request, until its end."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self.finish_reason: FinishReason | None = None

    @property
    def todo(self) -> int:
        """The gap: tokens known or in flight whose KV is not scheduled."""
        return len(self.tokens) + self.inflight - self.num_computed

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
