"""top_k, top_p and min_p without a sort, as functions of the sampling kernel: one program works on one row.

A token passes top_k if fewer than k tokens have a higher logit, and top_p if the tokens with a higher logit hold less
than top_p of the mass that min_p and top_k left. Both are conditions "the sum of weights above it is less than a
target", so both are monotone in the logit.

top_k needs the threshold itself, because top_p's mass depends on it. `collect` gathers a set that surely holds it: the
row is known in pieces of PIECE tokens by their maxima, and where k maxima lie above a value, so do k tokens; for k far
below the number of pieces the tokens above such a value are little more than k. `kth` then narrows an interval of
order-preserving integer keys of floats 16-fold a round, down to one key.

top_p and min_p need no threshold: if the winner of the draw among a larger set passes, it is the winner among those
that pass, and if it does not, no token up to its logit passes either. So the winner is checked by one sum over the row
(`masses`), and with probability below 1 - top_p the draw is repeated among higher logits (`pick`).

Where nothing was collected, or more than CAPACITY, the whole row is the set.
"""

from __future__ import annotations

import triton.language as tl

from octavo.kernels.cuda.gumbel import best_of, fetch, noise_bound, usable
from octavo.kernels.cuda.launch import kernel

PIECE = 128
CAPACITY = 4096


@kernel()
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 that compares as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@kernel()
def value_of(key: tl.tensor) -> tl.tensor:
    """The inverse of `key_of`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@kernel()
def narrow(
    line: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    whole: tl.tensor,
    held: tl.tensor,
    k: tl.tensor,
    rounds: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """lo, hi int64 with lo < (key of the k-th highest) <= hi, after that many rounds; lo + 1 = hi at the end."""
    way = tl.arange(0, 16)
    lo = tl.full((), 2147483647, tl.int64)
    hi = tl.full((), -2147483648, tl.int64)
    for begin in range(0, whole + held, BLOCK):
        value, _token = fetch(line, values, ids, whole, held, begin, BLOCK)
        inside = begin + tl.arange(0, BLOCK) < whole + held
        key = key_of(value)
        lo = tl.minimum(lo, tl.min(tl.where(inside, key, 2147483647), 0).to(tl.int64))
        hi = tl.maximum(hi, tl.max(tl.where(inside, key, -2147483648), 0).to(tl.int64))
    lo -= 1
    left = tl.full((), 0, tl.int32) + rounds
    while (hi - lo > 1) & (left > 0):
        step = (hi - lo + 15) // 16
        pivots = tl.minimum(lo + step * (1 + way), hi).to(tl.int32)
        above = tl.zeros([16], tl.int32)
        for begin in range(0, whole + held, BLOCK):
            value, _token = fetch(line, values, ids, whole, held, begin, BLOCK)
            inside = begin + tl.arange(0, BLOCK) < whole + held
            higher = inside[:, None] & (key_of(value)[:, None] > pivots[None, :])
            above += tl.sum(higher.to(tl.int32), 0)
        passed = tl.sum((above >= k).to(tl.int32), 0)
        hi = tl.minimum(hi, lo + step * (passed + 1))
        lo += step * passed
        left -= 1
    return lo, hi


@kernel()
def collect(
    line: tl.tensor,
    maxima: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    pieces: tl.tensor,
    vocab: tl.tensor,
    k: tl.tensor,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Stores logits and ids of a set that holds the k highest, in order of ids; returns its size, 0 for too many.

    k is at most pieces. maxima [pieces] float32; it is overwritten by the list of pieces that are looked at.
    """
    lo, _hi = narrow(maxima, maxima, ids, pieces, 0, k, 4, BLOCK)
    piece = tl.arange(0, PIECES)
    highest = tl.load(maxima + piece, mask=piece < pieces, other=float("-inf"))
    chosen = ((piece < pieces) & (key_of(highest).to(tl.int64) > lo)).to(tl.int32)
    chosen_before = tl.cumsum(chosen, 0) - chosen
    tl.debug_barrier()
    tl.store(maxima + chosen_before, piece.to(tl.float32), mask=chosen != 0)
    tl.debug_barrier()
    total = tl.sum(chosen, 0) * PIECE
    n = tl.full((), 0, tl.int32)
    for begin in range(0, total, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        of = tl.load(maxima + at // PIECE, mask=at < total, other=0.0).to(tl.int32)
        token = of * PIECE + at % PIECE
        inside = (at < total) & (token < vocab)
        value = usable(tl.load(line + token, mask=inside, other=float("-inf")))
        kept = (inside & (key_of(value).to(tl.int64) > lo)).to(tl.int32)
        place = n + tl.cumsum(kept, 0) - kept
        tl.store(values + place, value, mask=(kept != 0) & (place < CAPACITY))
        tl.store(ids + place, token, mask=(kept != 0) & (place < CAPACITY))
        n += tl.sum(kept, 0)
    tl.debug_barrier()
    return tl.where(n <= CAPACITY, n, 0)


@kernel()
def masses(
    line: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    whole: tl.tensor,
    held: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    cut: tl.tensor,
    z_best: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Sums of exp(z) over the tokens with z >= cut, and over those of them with z > z_best, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, whole + held, BLOCK):
        value, _token = fetch(line, values, ids, whole, held, begin, BLOCK)
        z = tl.math.div_rn(value - top, heat)
        weight = tl.where(z >= cut, tl.exp(z), 0.0)
        total += weight
        above += tl.where(z > z_best, weight, 0.0)
    return tl.sum(total, 0), tl.sum(above, 0)


@kernel()
def pick(
    line: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    whole: tl.tensor,
    held: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    cut: tl.tensor,
    below: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Logit and id of the highest score among the tokens with z >= cut and z > below; (-inf, 0) if there are none."""
    score = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    for begin in range(0, whole + held, BLOCK):
        value, token = fetch(line, values, ids, whole, held, begin, BLOCK)
        z = tl.math.div_rn(value - top, heat)
        bound = z * 1.4426950408889634 + noise_bound(k0, k1, token, FAST)
        bound = tl.where((z >= cut) & (z > below), bound, float("-inf"))
        score, best, best_id = best_of(
            bound, line, values, ids, whole, held, begin, top, heat, k0, k1, score, best, best_id, BLOCK
        )
    return best, best_id
