"""StopMatcher against a naive search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.text import StopMatcher

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=6).map(tuple)
CHUNKS = st.lists(st.text("abc", max_size=7), max_size=10)


def first_match(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(end, stop): earliest end, then earliest start."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text.endswith(stop, 0, end)]
        if ending:
            return end, max(ending, key=len)
    return None


def can_still_match(tail: str, stops: tuple[str, ...]) -> bool:
    return any(stop.startswith(tail) and stop != tail for stop in stops)


@settings(deadline=None)
@given(stops=STOPS, chunks=CHUNKS, include=st.booleans())
@example(stops=("aab",), chunks=["a", "a", "a", "b"], include=False)
@example(stops=("ab", "b"), chunks=["a", "b"], include=False)
def test_equals_naive_search(stops: tuple[str, ...], chunks: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    text, out = "", ""
    for chunk in chunks:
        text += chunk
        safe, found = matcher.push(chunk)
        out += safe
        expected = first_match(text, stops)
        if expected is not None:
            end, stop = expected
            assert found == stop
            assert out == text[: end if include else end - len(stop)]
            assert matcher.push("ab") == ("", stop)
            assert matcher.flush() == ""
            return
        assert found is None
        held = text[len(out) :]
        assert text.startswith(out)
        if include:
            assert held == ""
        else:  # what is held may begin a stop string, and nothing longer may: neither a leak nor a delay
            assert held == "" or can_still_match(held, stops)
            assert not any(can_still_match(text[at:], stops) for at in range(len(out)))
    assert out + matcher.flush() == text


def test_no_stops_hold_nothing() -> None:
    matcher = StopMatcher((), include=False)
    assert matcher.push("text") == ("text", None)
    assert matcher.flush() == ""


@pytest.mark.parametrize("include", [True, False])
def test_work_is_linear(include: bool) -> None:
    """A stop string that nearly matches everywhere: a search that starts over would take minutes."""
    matcher = StopMatcher(("a" * 1000 + "b", "a" * 999 + "c"), include)
    out = "".join(matcher.push("a" * 4)[0] for _ in range(50_000))
    assert len(out) == (200_000 if include else 199_000)
    safe, found = matcher.push("b")
    assert found == "a" * 1000 + "b"
    assert len(safe) == (1 if include else 0)
