"""The text of one output on its way through a grammar: a cursor, the text held back, the events found.

Owns everything that makes parsing independent of how the text is cut, and linear. A grammar is a generator that takes
from a Source and yields where it needs more text; what is taken is never read again, and what is not taken at a yield
is shorter than a marker. Which markers mean what is the formats' business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeAlias, TypeVar

from octavo.text.parsing.events import Arguments, Content, Event, Reasoning, ToolCall

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
Sink: TypeAlias = Callable[[int], object]
"""Takes the text up to this position."""

SPACE = " \t\r\n"
BUDGET = 2**13
"""Work that one output may ask for; what is left of the output then is plain content. It is enough for 512 calls, 682
parameters or 4096 values in pythonic calls: models do not write more, but who wants to see a parser slow does."""
MARK_COST = 4
CALL_COST = 12
VALUE_COST = 2

_SPACES = re.compile(r"[ \t\r\n]*+")


class Malformed(Exception):
    """The text at the cursor does not continue the call."""


class Exhausted(Malformed):
    """The budget is spent."""


@lru_cache(maxsize=64)
def marks(*markers: str) -> re.Pattern[str]:
    """Finds the first of the markers (then `lastindex` is 1 or more) or what the text's end leaves of one (None).

    No marker is the beginning of another.
    """
    return re.compile(_trie(sorted(set(markers))) or r"(?!)")


def _trie(words: Iterable[str]) -> str:
    """A regex for the words in which the text may end after every character."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[0], []).append(word[1:])
    return "|".join(
        re.escape(first) + ("()" if rest == [""] else rf"(?:\Z|{_trie(rest)})") for first, rest in tails.items()
    )


class Source:
    """One output. Grammars take its text and report what it is.

    Taken text is held until it is certain: `call` and `arguments` drop it, as part of a call; `release` reports it as
    content, since it was no call after all or the output's end cuts it off. Whitespace at the end of content is held
    too, because a call may follow.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self.events: list[Event] = []
        self._held: list[str] = []
        self._fresh = False  # whitespace that follows is dropped
        self._calls = 0
        self._budget = BUDGET

    # ---- what was found

    def say(self, kind: type[Content] | type[Reasoning], end: int) -> None:
        """The text up to `end` is for the reader."""
        self._report(kind, self.text[self.at : end])
        self.at = end

    def release(self, kind: type[Content] | type[Reasoning] = Content) -> None:
        """What is held is for the reader."""
        held = "".join(self._held)
        self._held.clear()
        self._report(kind, held)

    def _report(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        body = text.rstrip(SPACE)
        space = text[len(body) :]
        if body:
            if self._held:
                body = "".join((*self._held, body))
                self._held.clear()
            if self._fresh:
                body = body.lstrip(SPACE)
                self._fresh = False
            self.events.append(kind(body))
        if space:
            self._held.append(space)

    def drop(self) -> None:
        """What is held was markup, and so is whitespace around it."""
        self._held.clear()
        self.skip_space()

    def skip_space(self) -> None:
        """Whitespace that follows is dropped."""
        self._fresh = True

    def call(self, name: str, ahead: str = "") -> None:
        """A call of this name is certain; `ahead`, the end of what is held, is not yet part of it."""
        self.drop()
        self.events.append(ToolCall(self._calls, name))
        self._calls += 1
        if ahead:
            self._held.append(ahead)

    def arguments(self, text: str) -> None:
        """More of the arguments of the last call."""
        self._held.clear()
        if text:
            self.events.append(Arguments(self._calls - 1, text))

    def pass_on(self, end: int, convert: Callable[[str], str] = str) -> None:
        """The text up to `end`, converted, is more of the arguments."""
        self._held.clear()
        self.events.append(Arguments(self._calls - 1, convert(self.text[self.at : end])))
        self.at = end

    def close(self) -> None:
        """The output is over: what is held was content after all."""
        self.release()
        if self._held and not self._fresh:
            self.events.append(Content("".join(self._held)))
        self._held.clear()

    def spend(self, cost: int = CALL_COST) -> None:
        """Raises Exhausted when the output has asked for too much work."""
        self._budget -= cost
        if self._budget < 0:
            raise Exhausted

    # ---- steps

    def take(self, end: int) -> str:
        """The text up to `end`, held."""
        piece = self.text[self.at : end]
        self.at = end
        self._held.append(piece)
        return piece

    def upto(self, stop: re.Pattern[str], sink: Sink) -> Steps[str]:
        """Gives the text before the next of the `marks` to `sink`, takes the mark and returns it; "" at the end."""
        while True:
            match = stop.search(self.text, self.at)
            if match is not None and match.lastindex:
                if match.start() > self.at:
                    sink(match.start())
                return self.take(match.end())
            end = len(self.text) if match is None or self.ended else match.start()
            if end > self.at:
                sink(end)
            if self.ended:
                return ""
            yield

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Steps[None]:
        """Gives what matches `pattern`, a run of single characters, to `sink`."""
        while True:
            match = pattern.match(self.text, self.at)
            end = match.end() if match else self.at
            if end > self.at:
                sink(end)
            if end < len(self.text) or self.ended:
                return
            yield

    def word(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Takes a run of characters that match `pattern`, maybe none."""
        pieces: list[str] = []
        yield from self.run(pattern, lambda end: pieces.append(self.take(end)))
        return "".join(pieces)

    def spaces(self) -> Steps[str]:
        """Takes whitespace; returns the character that follows, not taken, "" at the end."""
        yield from self.run(_SPACES, self.take)
        return self.text[self.at : self.at + 1]

    def literal(self, word: str) -> Steps[bool]:
        """Takes `word`, if that is what follows, or what the output's end leaves of it (and returns False)."""
        while not self.text.startswith(word, self.at):
            if len(self.text) - self.at >= len(word) or not word.startswith(self.text[self.at :]):
                return False
            if self.ended:
                self.take(len(self.text))
                return False
            yield
        self.take(self.at + len(word))
        return True

    def expect(self, word: str) -> Steps[None]:
        """Takes `word` after whitespace, or raises Malformed."""
        yield from self.spaces()
        if not (yield from self.literal(word)):
            raise Malformed

    def closing(self, *words: str) -> Steps[None]:
        """Drops the first of `words` that follows after whitespace; models forget it, so none need follow."""
        yield from self.spaces()
        for word in words:
            if (yield from self.literal(word)):
                self.drop()
                return
