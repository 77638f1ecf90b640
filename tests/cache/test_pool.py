"""The pool of pages."""

from __future__ import annotations

import pytest

from octavo.cache import BlockPool


def test_the_padding_page_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_the_page_released_longest_ago_is_reused_first() -> None:
    pool = BlockPool(5)
    blocks = pool.take(4)
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    assert pool.take(2) == [blocks[2], blocks[0]]


def test_a_free_page_keeps_its_identity_until_it_is_reused() -> None:
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.publish(block, (b"a", 0))
    pool.release([block])
    assert pool.lookup((b"a", 0)) == block
    pool.share(block)
    assert pool.num_used == 1
    pool.release([block])
    pool.take(2)
    assert pool.lookup((b"a", 0)) is None


def test_the_first_page_of_an_identity_wins() -> None:
    pool = BlockPool(4)
    first, second = pool.take(2)
    pool.publish(first, (b"a", 0))
    pool.publish(second, (b"a", 0))
    assert pool.lookup((b"a", 0)) == first
    pool.forget_block(second)
    assert pool.lookup((b"a", 0)) == first
    pool.check([[first, second]])


def test_what_is_forgotten_keeps_its_owner() -> None:
    pool = BlockPool(3)
    owned, free = pool.take(2)
    pool.publish(owned, (b"a", 0))
    pool.publish(free, (b"b", 0))
    pool.release([free])
    pool.forget()
    assert pool.lookup((b"a", 0)) is pool.lookup((b"b", 0)) is None
    pool.check([[owned]])


def test_check_finds_a_leak() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])
