"""Block tables, prefix hits and windows."""

from __future__ import annotations

import pytest

from octavo.cache import CacheManager
from octavo.config.engine import CacheConfig
from octavo.config.kv import pages_for_sequence
from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.core.sequence import Sequence
from tests.support.drive import groups_of


def manager(windows: list[int | None], *, num_blocks: int = 100, chunk: int = 8, prefix: bool = True) -> CacheManager:
    config = CacheConfig(
        block_size=4, num_blocks=num_blocks, prefix_caching=prefix, dtype="float32", groups=groups_of(windows)
    )
    return CacheManager(config, chunk)


def sequence(cache: CacheManager, tokens: list[int], salt: str = "", max_tokens: int = 50) -> Sequence:
    request = Request("r", tokens, SamplingParams(max_tokens=max_tokens), 0.0, cache_salt=salt)
    return Sequence(request, 0, 0, 0, frozenset(), cache.identity("r", salt, False), None)


def compute(cache: CacheManager, seq: Sequence, tokens: int) -> None:
    """Computes the sequence up to `tokens` in one step."""
    if not seq.blocks:
        cache.admit(seq, cache.find(seq))
    cache.leave_behind(seq)
    assert cache.grow(seq, tokens) is not None
    cache.computed += tokens - seq.num_computed
    seq.num_computed = tokens
    cache.publish(seq)


def test_a_hit_leaves_a_token_to_compute() -> None:
    cache = manager([None])
    first = sequence(cache, list(range(12)))
    compute(cache, first, 12)
    assert cache.find(sequence(cache, list(range(12)))) == 2
    assert cache.find(sequence(cache, list(range(13)))) == 3
    assert cache.find(sequence(cache, [9, *range(1, 13)])) == 0


def test_the_salt_separates_tenants() -> None:
    cache = manager([None])
    compute(cache, sequence(cache, list(range(12)), "a"), 12)
    assert cache.find(sequence(cache, list(range(13)), "a")) == 3
    assert cache.find(sequence(cache, list(range(13)), "b")) == 0


def test_without_prefix_cache_nothing_is_found() -> None:
    cache = manager([None], prefix=False)
    compute(cache, sequence(cache, list(range(12))), 12)
    assert cache.find(sequence(cache, list(range(13)))) == 0


def test_a_window_group_frees_what_it_left_behind() -> None:
    cache = manager([None, 5])
    seq = sequence(cache, list(range(40)))
    for tokens in range(8, 41, 8):
        compute(cache, seq, tokens)
    assert seq.blocks[0].count(0) == 0
    assert [bool(block) for block in seq.blocks[1]] == [False] * 7 + [True] * 5  # two of them for what comes
    cache.release(seq)
    assert cache.pool.num_used == cache.owned == cache.unused_slots == 0


def test_a_hit_needs_only_the_last_window() -> None:
    cache = manager([5])
    seq = sequence(cache, list(range(40)))
    for tokens in range(8, 41, 8):
        compute(cache, seq, tokens)
    again = sequence(cache, list(range(41)))
    assert cache.find(again) == 10
    cache.admit(again, 10)
    assert [bool(block) for block in again.blocks[0]] == [False] * 9 + [True]


def test_a_missing_block_of_the_window_shortens_the_hit() -> None:
    cache = manager([None, 6])
    seq = sequence(cache, list(range(24)))
    compute(cache, seq, 24)
    cache.pool.forget_block(seq.blocks[1][4])
    assert cache.find(sequence(cache, list(range(25)))) == 4


def test_grow_is_all_or_nothing() -> None:
    cache = manager([None, None], num_blocks=4)
    seq = sequence(cache, list(range(12)))
    cache.admit(seq, 0)
    assert cache.grow(seq, 8) is None
    assert cache.pool.num_used == 0
    assert cache.grow(seq, 4) is not None


def test_tables_grow_by_several_blocks_while_there_is_plenty() -> None:
    cache = manager([None], num_blocks=17)  # scarce below 4 free
    first, second = (sequence(cache, [token] * 3) for token in (1, 2))
    for seq, tokens, blocks in [(first, 1, 4), (first, 17, 8), (second, 1, 12), (second, 17, 13), (second, 21, 14)]:
        if not seq.blocks:
            cache.admit(seq, 0)
        assert cache.grow(seq, tokens) is not None
        assert cache.pool.num_used == blocks
        assert cache.capacity == 4 * blocks


def test_tables_do_not_grow_beyond_the_end_of_their_sequence() -> None:
    cache = manager([None])
    seq = sequence(cache, list(range(7)), max_tokens=15)
    compute(cache, seq, 7)
    assert len(seq.blocks[0]) == 4
    assert cache.grow(seq, 17) == [(0, 4, [5, 6])]  # the last of 22 tokens is not computed
    assert seq.capacity == 24


@pytest.mark.parametrize("window", [1, 4, 5, 13])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_pool_of_the_promised_pages_holds_a_sequence(window: int, chunk: int) -> None:
    most = pages_for_sequence(groups_of([None, window]), 60, chunk, 4)
    cache = manager([None, window], num_blocks=1 + most, chunk=chunk)
    seq = sequence(cache, list(range(60)))
    for tokens in [*range(chunk, 60, chunk), 60]:
        compute(cache, seq, tokens)
