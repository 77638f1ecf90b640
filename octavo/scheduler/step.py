"""The step under construction and the record of steps in flight.

`StepBuilder` collects what `Scheduler.schedule` decides and turns it into a `Plan`; `Inflight` remembers which sequence
stands where in a launched plan until its result is committed. Neither decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from octavo.cache import NewBlocks
from octavo.core.plan import Admit, Plan
from octavo.core.sequence import Sequence
from octavo.scheduler.riders import Crew


@dataclass(frozen=True, slots=True)
class Inflight:
    """A launched plan: its sequences in its order, of which the first `num_sampled` get tokens."""

    members: list[Sequence]
    num_sampled: int
    crew: Crew
    """The first of all, one token each."""
    ending: list[Sequence]
    """Those of the crew that may have no token after this one."""
    drafted: range
    """Places of those with drafts."""

    @property
    def sampled(self) -> list[Sequence]:
        return self.members[: self.num_sampled]


@dataclass(slots=True)
class StepBuilder:
    """What the next plan will hold; `budget` is what is left of the tokens that one step may compute."""

    number: int
    budget: int
    attended: list[Sequence] = field(default_factory=list)
    """Those looked at that will be of the crew."""
    crew: Crew = field(default_factory=lambda: Crew.of([]))
    """Who gets one token."""
    ending: list[Sequence] = field(default_factory=list)
    """Those of `decode` that may have no token after this one."""
    drafted: list[Sequence] = field(default_factory=list)
    closing: list[tuple[Sequence, int]] = field(default_factory=list)
    """(sequence, first position of its chunk): chunks that reach the sequence's end, so a token is sampled."""
    open: list[tuple[Sequence, int]] = field(default_factory=list)
    admit: list[Admit] = field(default_factory=list)
    blocks: list[tuple[int, int, int, list[int]]] = field(default_factory=list)

    def add_blocks(self, seq: Sequence, new: NewBlocks) -> None:
        assert seq.row is not None
        for group, first, ids in new:
            self.blocks.append((seq.row, group, first, ids))

    def take(self, crew: Crew) -> None:
        """Gives each of `crew` one token."""
        self.crew = crew
        self.budget -= len(crew.sequences)

    @property
    def decode(self) -> list[Sequence]:
        return self.crew.sequences

    @property
    def others(self) -> list[Sequence]:
        """All but `decode`."""
        return self.drafted + [seq for seq, _ in self.closing] + [seq for seq, _ in self.open]

    @property
    def num_sampled(self) -> int:
        return len(self.decode) + len(self.drafted) + len(self.closing)

    def members(self) -> list[Sequence]:
        others = self.others
        return self.decode + others if others else self.decode

    @property
    def empty(self) -> bool:
        return not (self.decode or self.drafted or self.closing or self.open)

    def plan(self, retire: list[int], rewind: list[tuple[int, int]]) -> Plan:
        tokens: list[int] = []
        counts: list[int] = []
        for seq in self.drafted:
            tokens += seq.draft
            counts.append(1 + len(seq.draft))
        for seq, start in self.closing + self.open:
            tokens += seq.tokens[start : seq.num_computed]
            counts.append(seq.num_computed - start)
        others = self.others
        return Plan(
            step=self.number,
            retire=retire,
            admit=self.admit,
            rewind=rewind,
            blocks=self.blocks,
            rows=np.concatenate((self.crew.rows, Crew.of(others).rows)) if others else self.crew.rows,
            num_decode=len(self.decode),
            num_drafted=len(self.drafted),
            num_sampled=self.num_sampled,
            counts=np.array(counts, np.int32),
            tokens=np.array(tokens, np.int32),
        )

    def inflight(self) -> Inflight:
        first = len(self.decode)
        drafted = range(first, first + len(self.drafted))
        return Inflight(self.members(), self.num_sampled, self.crew, self.ending, drafted)
