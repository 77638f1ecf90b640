"""Log-probabilities in the API's forms. Owns the choice of what is shown, not the numbers.

A token that only ends a sequence is no part of the answer and is not shown. The `bytes` of a token come from the
vocabulary, never from decoded text, so that the bytes of a split character join to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octavo.core.params import SamplingParams
from octavo.frontend.outputs import CompletionOutput, Logprob, Position
from octavo.server.wire import ChatLogprobs, CompletionLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from octavo.text import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def shown(output: CompletionOutput, params: SamplingParams) -> list[Position] | None:
    """The positions of `output` that carry text: all but an end-of-sequence or stop token."""
    positions = output.logprobs
    if positions is None or output.finish_reason != "stop" or params.include_stop_str_in_output:
        return positions
    return positions if isinstance(output.stop_reason, str) else positions[:-1]


def _text(token: int, entry: Logprob, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids or entry.decoded_token is None else entry.decoded_token


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)


def _best(position: Position, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely candidates; a chosen token that is not among them is left out."""
    return sorted(position.items(), key=lambda item: -item[1].logprob)[:count]


def chat_logprobs(
    positions: Sequence[Position], top: int, tokenizer: Tokenizer | None, *, as_ids: bool = False
) -> ChatLogprobs:
    """`top` alternatives at each position; with `as_ids` a token is named "token_id:N"."""

    def spelling(token: int) -> list[int] | None:
        return None if tokenizer is None else list(tokenizer.token_bytes(token))

    content = []
    for position in positions:
        token, entry = next(iter(position.items()))
        best = [TopLogprob(_text(t, e, as_ids), _value(e), spelling(t)) for t, e in _best(position, top)]
        content.append(TokenLogprob(_text(token, entry, as_ids), _value(entry), spelling(token), best))
    return ChatLogprobs(content)


def completion_logprobs(
    positions: Sequence[Position | None], offset: int, first: str = "", *, as_ids: bool = False
) -> tuple[CompletionLogprobs, int]:
    """The lists for `positions`, the first text at `offset`, and the offset after them.

    A position that is None, the first of a prompt, has no probability; its text is `first`. With `as_ids` a token is
    named "token_id:N".
    """
    lists = CompletionLogprobs([], [], [], [])
    for position in positions:
        if position is None:
            text, value, candidates = first, None, None
        else:
            token, entry = next(iter(position.items()))
            text, value = _text(token, entry, as_ids), _value(entry)
            candidates = {_text(t, e, as_ids): _value(e) for t, e in position.items()}
        lists.text_offset.append(offset)
        lists.tokens.append(text)
        lists.token_logprobs.append(value)
        lists.top_logprobs.append(candidates)
        offset += len(text)
    return lists, offset


def prompt_logprobs(positions: Sequence[Position | None] | None) -> PromptLogprobs | None:
    """vLLM's form: per prompt token the candidates by token id, None for the first."""
    if positions is None:
        return None

    def entry(logprob: Logprob) -> dict[str, Any]:
        return {"logprob": _value(logprob), "rank": logprob.rank, "decoded_token": logprob.decoded_token}

    return [None if p is None else {str(token): entry(e) for token, e in p.items()} for p in positions]
