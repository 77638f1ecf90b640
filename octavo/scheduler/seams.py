"""Where features attach to the scheduler: constraints on who may run, proposers of drafts.

A feature adds an object here; the scheduler's core has no branch for it.
"""

from __future__ import annotations

from typing import Protocol

from octavo.core.sequence import Sequence


class Constraint(Protocol):
    """Says whether a waiting sequence may start in the step being built; one that may not is passed over."""

    def fits(self, seq: Sequence) -> bool: ...


class Proposer(Protocol):
    """Guesses the tokens that follow a sequence whose tokens are all known on the host."""

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        """At most `limit` token ids, possibly none."""
        ...


class SiblingsShare:
    """The sequences of one request wait until the first has published the prompt, so that they share its blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def fits(self, seq: Sequence) -> bool:
        leader = seq.leader
        if leader is None or leader.finished or seq.identity is None:
            return True
        return leader.published >= (leader.prompt_len - 1) // self._block_size
