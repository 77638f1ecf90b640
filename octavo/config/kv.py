"""Which layers share a caching rule, and what a block of their KV costs.

Layers with the same rule (full attention, one window size) are split into **KV groups** of equal layer count,
the greatest common divisor of the rules' layer counts. A page is one block of one group, so a single pool of
equal pages serves all groups: layer j of every group lives in cache tensor j. A plain model has one group.
Does not own blocks (`cache`) or tensors (`worker`).
"""

from __future__ import annotations

from collections import defaultdict
from math import gcd

import msgspec

from octavo.core.facts import ModelFacts

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class KVGroup(msgspec.Struct, frozen=True):
    """`layers` with one caching rule: the last `window` tokens, the current one included, or all (None)."""

    index: int
    layers: tuple[int, ...]
    window: int | None


def kv_groups(facts: ModelFacts) -> tuple[KVGroup, ...]:
    """Groups of equal layer count, rules in order of their first layer."""
    rules: dict[int | None, list[int]] = defaultdict(list)
    for layer, window in enumerate(facts.windows):
        rules[window].append(layer)
    size = gcd(*(len(layers) for layers in rules.values()))
    chunks = [
        (window, tuple(layers[i : i + size])) for window, layers in rules.items() for i in range(0, len(layers), size)
    ]
    return tuple(KVGroup(index, layers, window) for index, (window, layers) in enumerate(chunks))


def page_bytes(facts: ModelFacts, groups: tuple[KVGroup, ...], block_size: int, dtype: str) -> int:
    """Bytes of one page: keys and values of `block_size` tokens in the layers of one group."""
    return 2 * len(groups[0].layers) * block_size * facts.kv_size * DTYPE_BYTES[dtype]


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def pages_for_sequence(groups: tuple[KVGroup, ...], tokens: int, chunk: int, block_size: int) -> int:
    """Most pages that one sequence of `tokens` tokens, computed in steps of at most `chunk`, owns at once.

    A window group holds the window before a chunk and the chunk; neither starts at a block's edge.
    """
    total = 0
    for group in groups:
        held = tokens if group.window is None else min(tokens, group.window - 1 + chunk + block_size)
        total += blocks_for(held, block_size)
    return total
