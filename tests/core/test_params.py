"""Bounds of sampling parameters, and their way over the wire."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams

WRONG: list[tuple[str, Any]] = [
    ("n", 0), ("n", 1000), ("n", 1.5), ("n", True), ("temperature", -0.1), ("temperature", math.nan),
    ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("presence_penalty", 3),
    ("frequency_penalty", -3), ("repetition_penalty", 0), ("seed", 2**64), ("max_tokens", 0), ("min_tokens", -1),
    ("logprobs", 21), ("prompt_logprobs", -1), ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 65),
    ("stop_token_ids", [-1]), ("stop_token_ids", "1"), ("allowed_token_ids", []), ("logit_bias", {1: 101}),
    ("logit_bias", {"a": 1}), ("logit_bias", {1: None}), ("bad_words", [""]), ("temperature", None), ("top_p", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_out_of_bounds_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 9, above max_tokens 4"):
        SamplingParams(max_tokens=4, min_tokens=9)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_round_trip_keeps_everything() -> None:
    params = SamplingParams(
        n=2, stop=["a", "b"], stop_token_ids=[3], logit_bias={4: -1.5}, allowed_token_ids=[4, 5], seed=-7, logprobs=3
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert params.stops == ("a", "b")
    assert params.replace(n=1).n == 1
