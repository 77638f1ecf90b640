"""The step under construction and the record of steps in flight.

`StepBuilder` collects what `Scheduler.schedule` decides and turns it into a `Plan`; `Inflight` remembers which sequence
stands where in a launched plan until its result is committed. Neither decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from octavo.cache import NewBlocks
from octavo.core.plan import Admit, Plan
from octavo.core.sequence import Sequence

_row = attrgetter("row")


@dataclass(frozen=True, slots=True)
class Inflight:
    """A launched plan: `sampled` in the plan's order, the first `num_decode` of them without drafts or chunks.

    The result matters at once for those in `telling`; the others only keep their token.
    """

    sampled: list[Sequence]
    num_decode: int
    members: list[Sequence]
    telling: set[Sequence]


@dataclass(slots=True)
class StepBuilder:
    """What the next plan will hold; `budget` is what is left of the tokens that one step may compute."""

    number: int
    budget: int
    decode: list[Sequence] = field(default_factory=list)
    telling: set[Sequence] = field(default_factory=set)
    """Those of `decode` whose token ends them, or is to be told or looked at."""
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

    def members(self) -> list[Sequence]:
        chunked = [seq for seq, _ in self.closing] + [seq for seq, _ in self.open]
        return self.decode + self.drafted + chunked

    @property
    def empty(self) -> bool:
        return not (self.decode or self.drafted or self.closing or self.open)

    def plan(self, retire: list[int], rewind: list[tuple[int, int]]) -> Plan:
        members = self.members()
        tokens: list[int] = []
        counts: list[int] = []
        for seq in self.drafted:
            tokens += seq.draft
            counts.append(1 + len(seq.draft))
        for seq, start in self.closing + self.open:
            tokens += seq.tokens[start : seq.num_computed]
            counts.append(seq.num_computed - start)
        return Plan(
            step=self.number,
            retire=retire,
            admit=self.admit,
            rewind=rewind,
            blocks=self.blocks,
            rows=np.fromiter(map(_row, members), np.int32, len(members)),
            num_decode=len(self.decode),
            num_drafted=len(self.drafted),
            num_sampled=len(self.decode) + len(self.drafted) + len(self.closing),
            counts=np.array(counts, np.int32),
            tokens=np.array(tokens, np.int32),
        )

    def inflight(self) -> Inflight:
        others = self.drafted + [seq for seq, _ in self.closing]
        return Inflight(self.decode + others, len(self.decode), self.members(), self.telling.union(others))
