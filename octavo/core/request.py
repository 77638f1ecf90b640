"""What crosses between frontend and engine: requests one way, token deltas the other.

Pure data, encoded as msgpack arrays; never pickled. Owns no behaviour: the scheduler decides, the frontend presents.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.core.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Request(msgspec.Struct, array_like=True, frozen=True):
    """One validated request. The engine makes `params.n` sequences of it, with seeds seed, seed+1, ...

    `params.max_tokens` is set and fits the context; bad words arrive as token ids. `arrival` is time.time(). With
    `whole` nobody reads before the end, and each sequence is answered with a single delta. `grammar` is what
    `params.structured_outputs`, None by now, was compiled to; "" leaves the text free.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    bad_word_ids: list[list[int]] = []
    cache_salt: str = ""
    whole: bool = False
    grammar: str = ""


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities at one position: the chosen token first, then the k best in falling order.

    `rank` is the chosen token's rank in the distribution, 1 for the most likely.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class Delta(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one sequence, and its end when `finish_reason` is set (then it is the last delta).

    The first delta of a sequence carries `cached_tokens` (prompt tokens served by the prefix cache), `scheduled_at`
    (time.time() of its first step) and, when asked for, `prompt_logprobs` (None for the first prompt token). The only
    delta of a `whole` request says when its first token came (`first_token_at`).
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    error: str | None = None


class Stats(msgspec.Struct, array_like=True):
    """Counters and gauges of the engine. Token and event counts only ever grow."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    kv_tokens_held: float = 0.0
    kv_slots_owned: float = 0.0
    host_seconds: float = 0.0
    device_busy_seconds: float = 0.0
    device_idle_seconds: float = 0.0


# Frontend -> engine
class Add(msgspec.Struct, array_like=True, tag="add"):
    requests: list[Request]


class Finish(msgspec.Struct, array_like=True, tag="finish"):
    """Ends sequences: (request id, index), index -1 for all of a request.

    Those of a `whole` request answer with their delta, finish_reason "abort"; no delta of the others follows.
    """

    sequences: list[tuple[str, int]]


class ResetPrefixCache(msgspec.Struct, array_like=True, tag="reset"):
    call: int


class Shutdown(msgspec.Struct, array_like=True, tag="shutdown"):
    pass


ToEngine = Add | Finish | ResetPrefixCache | Shutdown


# Engine -> frontend
class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The engine accepts requests. `decisions` are the resolved settings with reasons, for the log."""

    config: bytes
    kv_tokens: int
    load_seconds: float


class Outputs(msgspec.Struct, array_like=True, tag="outputs"):
    deltas: list[Delta]
    stats: Stats


class Reply(msgspec.Struct, array_like=True, tag="reply"):
    """Answers the call of the same number; `ok` False means that it could not be done now."""

    call: int
    ok: bool


class Progress(msgspec.Struct, array_like=True, tag="progress"):
    """How far loading is: `done` of `total` units of `what`."""

    what: str
    done: int
    total: int


class Died(msgspec.Struct, array_like=True, tag="died"):
    """The engine is ending because of `error`; `config` True when the user's settings are at fault."""

    error: str
    config: bool = False


FromEngine = Ready | Outputs | Reply | Progress | Died
