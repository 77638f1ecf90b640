"""From the engine's token deltas to results: text, stop strings, logprobs, moments.

A request's state is also its mailbox. The reader of the engine pushes deltas into it at once, so that a stop string
ends a sequence in time; a consumer takes what has gathered since it last asked. A slow consumer therefore costs no
more memory than the finished result. Owns no IO and no clock: the caller passes the time.

Streamed and whole text are the same pieces in the same order, joined at different moments.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.request import Delta, FinishReason, Request, TokenLogprobs
from octavo.frontend.outputs import CompletionOutput, Logprob, Position, RequestMetrics, RequestOutput
from octavo.text import Detokenizer, StopMatcher, Tokenizer


class SequenceState:
    """One sequence: what it is made of, and what of it has not been taken yet."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer | None, shown: frozenset[int] = frozenset()
    ) -> None:
        params = request.params
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.fresh = False
        """Something has come since the last `take`."""
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                shown=shown,
                prompt=request.prompt_token_ids,
            )
        self._stopper = StopMatcher(params.stops, params.include_stop_str_in_output) if params.stops else None
        self._num_tokens = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Position] = []
        self._cumulative = 0.0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, delta: Delta) -> bool:
        """Takes in `delta`; True when a stop string ends the sequence before the engine did."""
        ids, reason, stop = delta.token_ids, delta.finish_reason, None
        if self._detokenizer is not None:
            kept, stop = self._decode(self._detokenizer, ids, reason)
            ids = ids if kept == len(ids) else ids[:kept]
        self._num_tokens += len(ids)
        self._token_ids += ids
        for entry in (delta.logprobs or ())[: len(ids)]:
            self._logprobs.append(position(entry, self._tokenizer))
            self._cumulative += entry.logprobs[0]
        self.fresh = True
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        else:
            self.finish_reason, self.stop_reason = reason, delta.stop_reason
        return stop is not None and reason is None

    def _decode(
        self, detokenizer: Detokenizer, ids: Sequence[int], reason: FinishReason | None
    ) -> tuple[int, str | None]:
        """Adds the text of `ids`; how many of them belong to the sequence, and the stop string that ended it.

        The engine ends with "stop" on a token, the last one, whose text is not part of the answer.
        """
        params, stopper = self._params, self._stopper
        spoken = ids[:-1] if reason == "stop" and not params.include_stop_str_in_output else ids
        if stopper is None:
            self._text.append(detokenizer.push(spoken))
            if reason is not None:
                self._text.append(detokenizer.flush())
            return len(ids), None
        for i, token in enumerate(spoken):
            piece = detokenizer.push((token,))
            if self._num_tokens + i < params.min_tokens:
                self._text.append(piece)
                continue
            safe, stop = stopper.push(piece)
            self._text.append(safe)
            if stop is not None:
                return i + 1, stop
        if reason is None:
            return len(ids), None
        safe, stop = stopper.push(detokenizer.flush())
        self._text += [safe, "" if stop is not None else stopper.flush()]
        return len(ids), stop

    def take(self) -> CompletionOutput:
        """What has come since the last call."""
        wanted = self._params.logprobs is not None
        output = CompletionOutput(
            self.index,
            "".join(self._text),
            self._token_ids,
            self._cumulative if wanted else None,
            self._logprobs if wanted else None,
            self.finish_reason,
            self.stop_reason,
        )
        self._text, self._token_ids, self._logprobs = [], [], []
        self.fresh = False
        return output


class RequestState:
    """One request and its sequences. With `stream` it may be taken whenever something is new, else once, at the end."""

    def __init__(
        self,
        request: Request,
        request_id: str,
        prompt: str | None,
        stream: bool,
        tokenizer: Tokenizer | None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.prompt = prompt
        self.stream = stream
        self.metrics = RequestMetrics(request.arrival)
        self.sequences = [SequenceState(i, request, tokenizer, shown) for i in range(request.params.n)]
        self.unfinished = request.params.n
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[Position | None] | None = None
        self._cached_tokens: int | None = None
        self._error: str | None = None

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    def push(self, delta: Delta, now: float) -> bool:
        """Takes in a delta of one sequence; True when a stop string ended it before the engine did."""
        sequence = self.sequences[delta.index]
        if sequence.finished:
            return False
        metrics = self.metrics
        if self._cached_tokens is None:
            self._cached_tokens = delta.cached_tokens
            metrics.scheduled_time = delta.scheduled_at
        if delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = [
                None if entry is None else position(entry, self._tokenizer) for entry in delta.prompt_logprobs
            ]
        if delta.token_ids:
            metrics.first_token_time = metrics.first_token_time or delta.first_token_at or now
            metrics.last_token_time = now
            metrics.num_generation_tokens += len(delta.token_ids)
        self._error = self._error or delta.error
        stopped = sequence.push(delta)
        self.unfinished -= sequence.finished
        return stopped

    def take(self) -> RequestOutput:
        """What is new since the last call."""
        output = RequestOutput(
            self.request_id,
            self.prompt,
            self.request.prompt_token_ids,
            [sequence.take() for sequence in self.sequences if sequence.fresh],
            self.finished,
            self._prompt_logprobs,
            self.metrics,
            self._cached_tokens,
            self._error,
        )
        self._prompt_logprobs = None
        return output


class OutputProcessor:
    """The requests in flight, by the id that the engine knows them by."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.states: dict[str, RequestState] = {}

    def add(
        self,
        request: Request,
        prompt: str | None = None,
        *,
        request_id: str | None = None,
        stream: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> RequestState:
        """Registers `request`; `request_id` is the caller's name for it where that differs from the engine's.

        `shown` are special tokens that stay in the text whatever `skip_special_tokens` says.
        """
        assert request.id not in self.states
        state = RequestState(request, request_id or request.id, prompt, stream, self._tokenizer, shown)
        self.states[request.id] = state
        return state

    def process(self, deltas: Sequence[Delta], now: float) -> tuple[list[RequestState], list[tuple[str, int]]]:
        """Pushes `deltas` of time `now`. Returns the states to take from, and the sequences that the engine must end.

        Deltas of requests that are no longer known, and of sequences that have ended, are dropped.
        """
        touched: dict[str, RequestState] = {}
        ended: list[tuple[str, int]] = []
        for delta in deltas:
            state = self.states.get(delta.request_id)
            if state is None:
                continue
            if state.push(delta, now):
                ended.append((delta.request_id, delta.index))
            if state.finished:
                del self.states[delta.request_id]
            if state.stream or state.finished:
                touched[delta.request_id] = state
        return list(touched.values()), ended

    def abort(self, id: str, now: float) -> RequestState | None:
        """Ends what is unfinished of a request with "abort"; None when there is no such request."""
        state = self.states.get(id)
        if state is None:
            return None
        open_ones = [sequence.index for sequence in state.sequences if not sequence.finished]
        self.process([Delta(id, index, [], "abort") for index in open_ones], now)
        return state


def position(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> Position:
    """Logprobs at one position by token id: the chosen token with its rank, then the best with ranks 1, 2, ..."""
    found: Position = {}
    for i, (token, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        if token not in found:
            text = None if tokenizer is None else tokenizer.token_text(token)
            found[token] = Logprob(logprob, entry.rank if i == 0 else i, text)
    return found
