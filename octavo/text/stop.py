"""Stop strings in text that arrives in pieces of any alignment.

Owns the text that may yet turn out to begin a stop string. Does not end a sequence: the caller does.
"""

from __future__ import annotations

from functools import lru_cache


class _Automaton:
    """Aho-Corasick over all stop strings (CACM 18(6), 1975): one transition per character, whatever their number.

    A state is the longest suffix of the text that begins some stop string; `depth` is its length, `fail` its longest
    proper suffix that is a state too, `found` the longest stop string that ends there.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fail = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            state = 0
            for char in stop:
                state = self._child(state, char)
            self.found[state] = stop
        self._link()

    def _child(self, state: int, char: str) -> int:
        child = self.edges[state].get(char)
        if child is None:
            child = self.edges[state][char] = len(self.edges)
            self.edges.append({})
            self.depth.append(self.depth[state] + 1)
            self.fail.append(0)
            self.found.append(None)
        return child

    def _link(self) -> None:
        """Fills `fail` and `found` breadth first, so that those of shorter states are there."""
        queue = list(self.edges[0].values())
        for state in queue:
            for char, child in self.edges[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                self.found[child] = self.found[child] or self.found[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while (child := self.edges[state].get(char)) is None:
            if state == 0:
                return 0
            state = self.fail[state]
        return child


_automaton = lru_cache(maxsize=16)(_Automaton)


class StopMatcher:
    """Looks for the first stop string of a text: the one that ends first, of several that end together the longest.

    Text is released as soon as no continuation can make it part of a stop string. With `include` the stop string
    belongs to the text, so nothing needs to be held back. `stops` are not empty strings.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._automaton = _automaton(stops) if stops else None
        self._include = include
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text safe to emit, the stop string once it is complete). After a match everything is dropped."""
        automaton = self._automaton
        if automaton is None:
            return text, None
        if self._matched is not None:
            return "", self._matched
        state = self._state
        for position, char in enumerate(text, 1):
            state = automaton.step(state, char)
            found = automaton.found[state]
            if found is not None:
                self._matched = found
                before = self._held + text[:position]
                self._held = ""
                return (before if self._include else before[: -len(found)]), found
        self._state = state
        if self._include:
            return text, None
        whole = self._held + text
        safe = len(whole) - automaton.depth[state]
        self._held = whole[safe:]
        return whole[:safe], None

    def flush(self) -> str:
        """The end of the text: what was held back, since no stop string came of it."""
        held, self._held, self._state = self._held, "", 0
        return held
