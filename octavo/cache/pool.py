"""The pool of KV pages: who owns which, and which hold a prefix that may be wanted again.

Owns reference counts, the free list and the map from block identity to page. Does not know sequences or tensors.
Page 0 is the padding page: it exists, is read by padding rows, and is never handed out.

A free page keeps its identity until it is reused, so a prefix stays available for as long as memory allows. The free
list is ordered by the time of release: the page released longest ago is reused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

Key = tuple[bytes, int]
"""Digest of the block's tokens and all before them, and the KV group."""


class BlockPool:
    """`num_blocks` pages including page 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks
        self._by_key: dict[Key, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, owned once each; the caller has checked `num_free`."""
        free, keys, refs = self._free, self._keys, self._refs
        assert count <= len(free), "the caller checks num_free before it takes"
        blocks = [free.popitem(False)[0] for _ in range(count)]
        for block in blocks:
            if keys[block] is not None:
                self.forget_block(block)
            refs[block] = 1
        return blocks

    def lookup(self, key: Key) -> int | None:
        return self._by_key.get(key)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def share(self, block: int) -> None:
        """One more owner for a page found by `lookup`."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner fewer for each. Given a sequence's last block first, its tail is reused before its head."""
        for block in blocks:
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} released more often than owned"
            if self._refs[block] == 0:
                self._free[block] = None

    def publish(self, block: int, key: Key) -> None:
        """Makes a full page findable. The first page of an identity wins; a second copy stays anonymous."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self) -> None:
        """Drops every identity."""
        for block in list(self._by_key.values()):
            self.forget_block(block)

    def forget_block(self, block: int) -> None:
        """Drops a page's identity, if it has one."""
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Asserts that reference counts are exactly what `owners` (block lists) hold and the free list is the rest."""
        counts = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                counts[block] += 1
        assert counts == self._refs, "reference counts differ from what sequences own"
        assert counts[0] == 0, "the padding page is owned"
        assert set(self._free) == {b for b in range(1, self.num_blocks) if counts[b] == 0}, "free list is wrong"
        assert all(self._keys[block] == key for key, block in self._by_key.items()), "identity map is wrong"
        assert len(self._by_key) == sum(key is not None for key in self._keys), "a page has a lost identity"
