from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.params import SamplingParams
from octavo.core.request import Delta, FinishReason, Request, TokenLogprobs
from octavo.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from octavo.frontend.process import OutputProcessor
from tests.frontend.tiny import EOS, byte_tokenizer


def deltas(pieces: Iterable[bytes | list[int]], reason: FinishReason | None = "length") -> list[Delta]:
    """One delta of request r for each piece, the last with `reason`."""
    made = [Delta("r", 0, list(piece)) for piece in pieces]
    made[-1].finish_reason = reason
    return made


def run(
    feed: list[Delta], *, stream: bool = False, tokenizer: bool = True, **params: Any
) -> tuple[list[RequestOutput], list[tuple[str, int]]]:
    """Everything that comes of `feed`, taken as soon as possible, and the sequences that the engine must end."""
    outputs = OutputProcessor(byte_tokenizer() if tokenizer else None)
    outputs.add(Request("r", [1, 2], SamplingParams(**params), 10.0), "ab", request_id="mine", stream=stream)
    results, ended = [], []
    for i, delta in enumerate(feed):
        ready, ending = outputs.process([delta], 11.0 + i)
        ended += ending
        results += [state.take() for state in ready]
    return results, ended


def whole(feed: list[Delta], **params: Any) -> CompletionOutput:
    (result,), _ = run(feed, **params)
    return result.outputs[0]


def test_a_whole_result() -> None:
    feed = deltas([b"h", b"i"])
    feed[0].cached_tokens, feed[0].scheduled_at = 1, 10.5
    (result,), ended = run(feed)
    assert result.outputs == [CompletionOutput(0, "hi", list(b"hi"), None, None, "length", None)]
    assert (result.request_id, result.prompt, result.prompt_token_ids) == ("mine", "ab", [1, 2])
    assert (result.finished, result.num_cached_tokens, ended) == (True, 1, [])
    metrics = result.metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.scheduled_time, metrics.first_token_time, metrics.last_token_time) == (
        10.0,
        10.5,
        11.0,
        12.0,
    )
    assert (metrics.first_token_latency, metrics.num_generation_tokens) == (1.0, 2)


def test_a_stream_holds_what_is_new() -> None:
    results, _ = run(deltas([b"h", b"i"]), stream=True)
    assert [(r.outputs[0].text, r.outputs[0].token_ids, r.finished) for r in results] == [
        ("h", [104], False),
        ("i", [105], True),
    ]


def test_a_slow_consumer_takes_everything_at_once() -> None:
    outputs = OutputProcessor(byte_tokenizer())
    state = outputs.add(Request("r", [1], SamplingParams(logprobs=0), 0.0), stream=True)
    for token in b"abc":
        outputs.process([Delta("r", 0, [token], logprobs=[TokenLogprobs([token], [-1.0], 1)])], 0.0)
    output = state.take().outputs[0]
    assert (output.text, output.token_ids, output.cumulative_logprob) == ("abc", list(b"abc"), -3.0)
    assert output.logprobs is not None
    assert [list(position) for position in output.logprobs] == [[97], [98], [99]]
    assert state.take().outputs == []


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi<eos>")])
def test_the_token_that_ends_a_sequence_is_no_text(include: bool, text: str) -> None:
    feed = deltas([b"h", [105, EOS]], "stop")
    output = whole(feed, include_stop_str_in_output=include, skip_special_tokens=False)
    assert (output.text, output.token_ids, output.finish_reason) == (text, [104, 105, EOS], "stop")
    assert output.stop_reason is None


def test_a_stop_token_id_is_the_stop_reason() -> None:
    feed = deltas([b"h", b"i"], "stop")
    feed[-1].stop_reason = 105
    output = whole(feed)
    assert (output.text, output.token_ids, output.stop_reason) == ("h", list(b"hi"), 105)


def test_special_tokens_inside() -> None:
    feed = [Delta("r", 0, [104, EOS, 105], "length")]
    assert whole(feed).text == "hi"
    assert whole(feed, skip_special_tokens=False).text == "h<eos>i"


def test_a_stop_string_across_deltas_ends_the_sequence() -> None:
    feed = deltas([b"one E", b"N", b"D tail", b"more"])
    (result,), ended = run(feed, stop="END")
    output = result.outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("one ", "stop", "END")
    assert bytes(output.token_ids) == b"one END"
    assert ended == [("r", 0)]
    assert whole(feed, stop="END", include_stop_str_in_output=True).text == "one END"


def test_a_stop_string_in_the_last_delta_needs_no_message() -> None:
    (result,), ended = run(deltas([b"x", b"END"]), stop="END")
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason, ended) == ("stop", "END", [])


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    results, _ = run(deltas([b"xE", b"N"]), stream=True, stop="END")
    assert [r.outputs[0].text for r in results] == ["x", "EN"]


def test_stop_strings_wait_for_min_tokens() -> None:
    output = whole(deltas([b"a", b"a", b"b", b"a", b"c"]), stop="a", min_tokens=2)
    assert (output.text, output.stop_reason) == ("aab", "a")


def test_logprobs_of_a_sequence_cut_by_a_stop_string() -> None:
    entries = [TokenLogprobs([t, 99, t], [-1.0, -0.5, -1.0], 2) for t in b"xEyz"]
    output = whole([Delta("r", 0, list(b"xEyz"), logprobs=entries)], stop="E", logprobs=2)
    assert output.cumulative_logprob == -2.0
    assert output.logprobs == [
        {120: Logprob(-1.0, 2, "x"), 99: Logprob(-0.5, 1, "c")},
        {69: Logprob(-1.0, 2, "E"), 99: Logprob(-0.5, 1, "c")},
    ]


def test_prompt_logprobs_come_once() -> None:
    feed = deltas([b"a", b"b"])
    feed[0].prompt_logprobs = [None, TokenLogprobs([98], [-2.0], 5)]
    first, second = run(feed, stream=True, prompt_logprobs=0)[0]
    assert first.prompt_logprobs == [None, {98: Logprob(-2.0, 5, "b")}]
    assert second.prompt_logprobs is None
    assert run(feed, prompt_logprobs=0)[0][0].prompt_logprobs == first.prompt_logprobs


@pytest.mark.parametrize("arguments", [{"detokenize": False}, {"tokenizer": False}])
def test_no_text_without_detokenizing(arguments: dict[str, Any]) -> None:
    output = whole(deltas([b"a", b"b"]), **arguments)
    assert (output.text, output.token_ids) == ("", list(b"ab"))


def test_an_unfinished_character_at_the_end() -> None:
    assert whole(deltas([b"a", "é".encode()[:1]])).text == "a\ufffd"


def test_sequences_of_a_request_end_one_by_one() -> None:
    outputs = OutputProcessor(byte_tokenizer())
    state = outputs.add(Request("r", [1], SamplingParams(n=2), 0.0), stream=True)
    outputs.process([Delta("r", 0, [97]), Delta("r", 1, [98], "length")], 0.0)
    first = state.take()
    assert [(o.index, o.text, o.finished) for o in first.outputs] == [(0, "a", False), (1, "b", True)]
    ready, _ = outputs.process([Delta("r", 1, [99]), Delta("r", 0, [100], "length")], 0.0)
    assert ready == [state]
    last = state.take()
    assert [(o.index, o.text) for o in last.outputs] == [(0, "d")]
    assert (first.finished, last.finished, outputs.states) == (False, True, {})


def test_an_error_is_told() -> None:
    (result,), _ = run([Delta("r", 0, [97]), Delta("r", 0, [], "error", error="step 3 failed")])
    assert (result.error, result.outputs[0].finish_reason, result.outputs[0].text) == ("step 3 failed", "error", "a")


def test_abort_ends_what_is_open_and_later_tokens_are_dropped() -> None:
    outputs = OutputProcessor(byte_tokenizer())
    state = outputs.add(Request("r", [1], SamplingParams(n=2, stop="END"), 0.0))
    outputs.process([Delta("r", 0, [97], "length"), Delta("r", 1, [69])], 0.0)
    assert outputs.abort("r", 1.0) is state
    assert outputs.process([Delta("r", 1, [99])], 0.0) == ([], [])
    assert [(o.text, o.finish_reason) for o in state.take().outputs] == [("a", "length"), ("E", "abort")]
    assert outputs.abort("r", 1.0) is None


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abé😀 E", max_size=30),
    stops=st.lists(st.text("abé E", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    include=st.booleans(),
)
def test_streamed_and_whole_text_are_equal(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    data = text.encode() or b"x"
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    feed = deltas([data[a:b] for a, b in itertools.pairwise(edges)])
    params: dict[str, Any] = {"stop": stops or None, "include_stop_str_in_output": include}
    streamed, _ = run(feed, stream=True, **params)
    output = whole(feed, **params)
    assert "".join(o.text for r in streamed for o in r.outputs) == output.text
    assert [t for r in streamed for o in r.outputs for t in o.token_ids] == output.token_ids
    assert streamed[-1].outputs[0].stop_reason == output.stop_reason
    found = [data.decode().find(stop) + len(stop) for stop in stops if stop in data.decode()]
    if not found:
        assert output.text == data.decode()
    elif include:
        assert output.text == data.decode()[: min(found)]
