"""The KV blocks of sequences: growing and freeing block tables, prefix hits, windows.

Owns the link between `Sequence.blocks` and the `BlockPool`. Does not decide who runs (`scheduler`) and holds no tensors
(`worker`).

Identity of a full block: a 128-bit BLAKE2b digest of (digest of the block before it, its tokens); the chain starts at
the sequence's `identity`, which carries what else the KV depends on (tenant salt, later adapter and media). Pool keys
are (digest, group).
"""

from __future__ import annotations

from hashlib import blake2b
from struct import Struct

from octavo.cache.pool import BlockPool
from octavo.config.engine import CacheConfig
from octavo.config.kv import blocks_for
from octavo.core.sequence import Sequence

NewBlocks = list[tuple[int, int, list[int]]]
"""(group, first index in the block table, block ids)."""
TOGETHER = 4
"""Blocks that a sequence takes, and generated ones that become findable, at once: several cost little more than one."""
PLENTY = 4
"""The pool has plenty while one in so many of its pages is free."""


class CacheManager:
    """Blocks for all sequences of one engine. `max_chunk` is the most tokens that a step computes of one sequence."""

    def __init__(self, config: CacheConfig, max_chunk: int) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.block_size = config.block_size
        self._packed = Struct(f"{config.block_size}i").pack
        self.prefix_caching = config.prefix_caching
        self.windows = [group.window for group in config.groups]
        self._windowed = any(self.windows)
        lasts = all(w is None or w > TOGETHER * self.block_size for w in self.windows)
        self.together = TOGETHER if lasts else 1
        """Blocks published at once while a sequence goes on, so few that no window leaves them behind before."""
        self._window_blocks = [
            None if w is None else blocks_for(w - 1 + max_chunk + self.block_size, self.block_size)
            for w in self.windows
        ]
        self.owned = 0
        """Table entries that sequences own; a shared block counts for each of them."""
        self.capacity = 0
        """Sum of all sequences' capacities."""
        self.computed = 0
        """Sum of all sequences' computed tokens, kept by whoever changes `num_computed`."""

    def identity(self, request_id: str, salt: str, shared: bool) -> bytes | None:
        """Root of a sequence's digests; with the prefix cache off only the sequences of one request share."""
        if self.prefix_caching:
            return blake2b(b"salt:" + salt.encode(), digest_size=16).digest()
        return blake2b(b"request:" + request_id.encode(), digest_size=16).digest() if shared else None

    def find(self, seq: Sequence) -> int:
        """Leading blocks that all groups can take from the prefix cache; at least one token is left to compute."""
        if seq.identity is None:
            return 0
        limit = (len(seq.tokens) - 1) // self.block_size
        self._extend_digests(seq, limit)
        lookup = self.pool.lookup
        for group, window in enumerate(self.windows):
            if window is None:
                limit = next((i for i in range(limit) if lookup((seq.digests[i], group)) is None), limit)
        windowed = [(g, w) for g, w in enumerate(self.windows) if w is not None]
        while limit:
            missing = max((self._last_missing(seq, g, w, limit) for g, w in windowed), default=-1)
            if missing < 0:
                break
            limit = missing
        return limit

    def _last_missing(self, seq: Sequence, group: int, window: int, hit: int) -> int:
        """Last block that a hit of `hit` blocks needs and the cache lacks, -1 for none: no longer hit passes it."""
        first = self._first_needed(hit * self.block_size, window)
        lookup = self.pool.lookup
        return next((i for i in range(hit - 1, first - 1, -1) if lookup((seq.digests[i], group)) is None), -1)

    def _first_needed(self, position: int, window: int) -> int:
        """First block that a query at `position` reads."""
        return max(0, position - window + 1) // self.block_size

    def can_admit(self, seq: Sequence, hit: int, reserved: int) -> bool:
        """Whether the pool holds all known tokens of a sequence with `hit` cached blocks besides `reserved` pages."""
        revived = 0
        for group, window in enumerate(self.windows):
            first = 0 if window is None else self._first_needed(hit * self.block_size, window)
            for i in range(first, hit):
                block = self.pool.lookup((seq.digests[i], group))
                revived += block is not None and self.pool.is_free(block)
        return self.pages_to_complete(seq, hit) + revived + reserved <= self.pool.num_free

    def pages_to_complete(self, seq: Sequence, held: int) -> int:
        """Pages still to take until all known tokens are computed, `held` blocks being there in each group."""
        missing = max(blocks_for(len(seq.tokens), self.block_size) - held, 0)
        return sum(missing if most is None else min(missing, most) for most in self._window_blocks)

    def admit(self, seq: Sequence, hit: int) -> NewBlocks:
        """Gives `seq` its cached blocks and sets `num_computed` to what they hold."""
        assert not seq.blocks
        new: NewBlocks = []
        for group, window in enumerate(self.windows):
            first = 0 if window is None else self._first_needed(hit * self.block_size, window)
            table = [0] * first
            for digest in seq.digests[first:hit]:
                block = self.pool.lookup((digest, group))
                assert block is not None
                self.pool.share(block)
                table.append(block)
            seq.blocks.append(table)
            self.owned += hit - first
            if hit > first:
                new.append((group, first, table[first:]))
        seq.num_computed = seq.capacity = hit * self.block_size
        self.computed += seq.num_computed
        self.capacity += seq.capacity
        seq.published = hit
        return new

    def grow(self, seq: Sequence, tokens: int) -> NewBlocks | None:
        """Block tables that hold `tokens` tokens; None, and nothing done, when the pool lacks the pages.

        While the pool has plenty, tables end at multiples of TOGETHER blocks or with the sequence, so that it asks less
        often.
        """
        if tokens <= seq.capacity:
            return []
        tables, size, free = seq.blocks, self.block_size, self.pool.num_free
        have, need = len(tables[0]), blocks_for(tokens, size)
        missing = min(-(-need // TOGETHER) * TOGETHER, blocks_for(seq.limit - 1, size)) - have
        if free - missing * len(tables) < self.pool.num_blocks // PLENTY:
            missing = need - have
            if missing * len(tables) > free:
                return None
        new: NewBlocks = []
        for group, table in enumerate(tables):
            taken = self.pool.take(missing)
            table += taken
            new.append((group, have, taken))
        self.owned += missing * len(tables)
        self.capacity += missing * size
        seq.capacity += missing * size
        return new

    @property
    def unused_slots(self) -> int:
        """Slots in owned entries behind the last token that is computed or scheduled."""
        return len(self.windows) * (self.capacity - self.computed)

    def leave_behind(self, seq: Sequence) -> None:
        """Frees blocks behind the window of every query from `num_computed` on.

        The step in flight may still read them; whoever gets them writes in a later step, and steps of a rank execute
        in order.
        """
        if not self._windowed:
            return
        for table, window in zip(seq.blocks, self.windows, strict=True):
            if window is None:
                continue
            index = min(self._first_needed(seq.num_computed, window), len(table)) - 1
            behind = []
            while index >= 0 and table[index]:
                behind.append(table[index])
                table[index] = 0
                index -= 1
            self.pool.release(behind)
            self.owned -= len(behind)

    def release(self, seq: Sequence) -> None:
        """Takes all blocks from `seq`; published ones stay findable until their pages are reused."""
        for table in seq.blocks:
            owned = [block for block in reversed(table) if block]
            self.pool.release(owned)
            self.owned -= len(owned)
        seq.blocks = []
        self.capacity -= seq.capacity
        self.computed -= seq.num_computed
        seq.num_computed = seq.published = seq.capacity = 0

    def publish(self, seq: Sequence, least: int = 1) -> None:
        """Makes findable the full blocks whose tokens are known and whose KV is written or scheduled.

        Does nothing when they are fewer than `least`.
        """
        full = min(seq.num_computed, len(seq.tokens)) // self.block_size
        if seq.identity is None or full < seq.published + least:
            return
        self._extend_digests(seq, full)
        digests, publish = seq.digests, self.pool.publish
        for group, table in enumerate(seq.blocks):
            for i in range(seq.published, full):
                if table[i]:
                    publish(table[i], (digests[i], group))
        seq.published = full

    def _extend_digests(self, seq: Sequence, count: int) -> None:
        assert seq.identity is not None
        size, digests, tokens = self.block_size, seq.digests, seq.tokens
        parent = digests[-1] if digests else seq.identity
        for i in range(len(digests), count):
            packed = self._packed(*tokens[i * size : (i + 1) * size])
            parent = blake2b(parent + packed, digest_size=16).digest()
            digests.append(parent)
