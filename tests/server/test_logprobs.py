"""What of the log-probabilities is shown, and the bytes of tokens that are part of a character."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.core.params import SamplingParams
from octavo.core.request import TokenLogprobs
from octavo.frontend.outputs import CompletionOutput, Position
from octavo.frontend.process import position
from octavo.server.logprobs import chat_logprobs, shown
from tests.frontend.tiny import EOS, byte_tokenizer


def positions(*tokens: int) -> list[Position]:
    return [position(TokenLogprobs([token, 65], [-1.0, float("-inf")], 2), byte_tokenizer()) for token in tokens]


def test_bytes_are_the_tokens() -> None:
    """Each token of a split character has its own byte, though its text is U+FFFD; together they are the character."""
    content = chat_logprobs(positions(*"é🙂".encode()), 1, byte_tokenizer()).content
    assert [entry.token for entry in content] == ["\ufffd"] * 6
    assert b"".join(bytes(entry.bytes or ()) for entry in content) == "é🙂".encode()
    assert [(top.token, top.bytes, top.logprob) for top in content[0].top_logprobs] == [("\ufffd", [0xC3], -1.0)]


def test_without_a_tokenizer_there_are_ids() -> None:
    told = [position(TokenLogprobs([7], [-1.0], 1), None)]
    (entry,) = chat_logprobs(told, 0, None).content
    assert (entry.token, entry.bytes) == ("token_id:7", None)


@pytest.mark.parametrize(
    ("reason", "stop_reason", "include", "count"),
    [
        ("stop", None, False, 2),
        ("stop", 98, False, 2),
        ("stop", None, True, 3),
        ("stop", "b", False, 3),
        ("length", None, False, 3),
        (None, None, False, 3),
    ],
)
def test_the_token_that_ends_is_not_shown(reason: Any, stop_reason: Any, include: bool, count: int) -> None:
    told = positions(97, 98, EOS)
    output = CompletionOutput(0, "ab", [97, 98, EOS], -3.0, told, reason, stop_reason)
    params = SamplingParams(logprobs=1, include_stop_str_in_output=include)
    assert shown(output, params) == told[:count]
