"""What a caller receives: results with vLLM's field names, so that scripts written for it read them unchanged.

Plain mutable dataclasses without logic; `process` fills them.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.core.request import FinishReason


@dataclass(slots=True)
class Logprob:
    """One candidate token: its natural log-probability, rank (1 is the most likely) and text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Position = dict[int, Logprob]
"""Token id -> Logprob at one position: the chosen token first, then the best ones in falling order."""


@dataclass(slots=True)
class RequestMetrics:
    """Moments of a request in time.time() seconds; 0.0 until they happen."""

    arrival_time: float
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    num_generation_tokens: int = 0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token."""
        return max(0.0, self.first_token_time - self.arrival_time)


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` sequences of a request: everything so far, or in a stream only what is new.

    `cumulative_logprob` is always of the whole sequence, None unless logprobs were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Position] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request. `finished` once all of its sequences are; `error` says why one ended with "error".

    In a stream, `outputs` holds the sequences that have news. `prompt_logprobs` has one entry per prompt token,
    None for the first; in a stream it comes once. `num_cached_tokens` counts the prompt tokens that the prefix cache
    served.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Position | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
