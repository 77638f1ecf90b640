"""Sequences that take one token in every step, and when each of them next needs more than that.

A step touches only the riders that are due: for a block, for their last token. All others advance with a clock that
they share (`Sequence.ride`), so a step of a thousand rows costs little more than one of ten. Owns who rides and when
riders are due; what is done about it is the scheduler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from octavo.core.plan import Int32s
from octavo.core.sequence import STILL, Clock, Sequence

SOON = 8
"""Steps whose riders are attended together, so that most steps need a word about none."""
_stop_ids = attrgetter("stop_ids")


@dataclass(frozen=True, slots=True)
class Crew:
    """Sequences that get one token each, and what their tokens mean: the same for as long as none comes or goes."""

    sequences: list[Sequence]
    rows: Int32s
    """[B]."""
    streaming: list[tuple[int, Sequence]]
    """Those that every token is told of, with their places."""
    detailed: list[tuple[int, Sequence]]
    """Those whose tokens come with log-probabilities."""
    stops: frozenset[int]
    """Tokens that end any of them."""

    @classmethod
    def of(cls, sequences: list[Sequence]) -> Crew:
        rows = np.array([seq.row for seq in sequences], np.int32)
        told = [(i, seq) for i, seq in enumerate(sequences) if not seq.quiet]
        streaming = [(i, seq) for i, seq in told if not seq.detailed]
        detailed = [(i, seq) for i, seq in told if seq.detailed]
        return cls(sequences, rows, streaming, detailed, frozenset().union(*map(_stop_ids, sequences)))

    def stopped(self, tokens: list[int]) -> list[Sequence]:
        """Those that their new tokens, the first of `tokens`, end."""
        if self.stops.isdisjoint(tokens):
            return []
        return [seq for seq, token in zip(self.sequences, tokens, strict=False) if token in seq.stop_ids]


class Riders:
    """All riders have one token to compute before each step and after it."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._members: dict[Sequence, int] = {}
        """When each is due."""
        self._due: dict[int, set[Sequence]] = {}
        self._crew: Crew | None = None

    def __len__(self) -> int:
        return len(self._members)

    def add(self, seq: Sequence, steps: int) -> None:
        """Takes `seq` in, or keeps it; it is due when `steps` have been taken, or less than SOON before."""
        due = self._clock.now + steps
        together = due - due % SOON
        due = together if together > self._clock.now else due
        before = self._members.get(seq)
        if before is None:
            seq.ride(self._clock)
            self._crew = None
        else:
            self._due[before].discard(seq)
        self._members[seq] = due
        group = self._due.get(due)
        if group is None:
            group = self._due[due] = set()
        group.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Puts `seq` off if it rides."""
        due = self._members.pop(seq, None)
        if due is not None:
            seq.ride(STILL)
            self._crew = None
            self._due[due].discard(seq)

    def due(self) -> list[Sequence]:
        """Those that the next step needs a word about, in order of arrival."""
        return sorted(self._due.get(self._clock.now, ()), key=attrgetter("order"))

    def advance(self) -> Crew:
        """Moves all by one token."""
        self._due.pop(self._clock.now, None)
        self._clock.now += 1
        if self._crew is None:
            self._crew = Crew.of(list(self._members))
        return self._crew

    def check(self) -> None:
        """Asserts that each is one token short, in a row, and due in time."""
        assert {seq: due for due, group in self._due.items() for seq in group} == self._members, "dues differ"
        for seq, due in self._members.items():
            assert seq.riding, "a rider has another clock"
            assert seq.row is not None, "a rider has no row"
            assert seq.todo == 1, "a rider is not one token short"
            steps = due - self._clock.now
            assert 0 <= steps <= min(seq.capacity, seq.limit - 1) - seq.num_computed, "a rider is due too late"
