"""Counter-based random numbers and the Gumbel-max draw among a tile of tokens, as functions of other kernels.

The random bits are those of `reference_sampling`, bit for bit. A draw is argmax(z + gumbel), z = (logit - max) /
temperature. Two accurate logarithms for each token would cost more than reading the logits, so tokens are screened by
a bound with one approximate logarithm:

    gumbel = -log(-log1p(-u)) <= -log(u),   hence   z + gumbel <= z - log(u),   nearly equal for the small u that win

`best_of` takes the token of the highest bound, computes its exact score, and goes on to the next highest for as long as
a bound can still beat the best score: once or twice on average.
"""

from __future__ import annotations

import triton.language as tl

from octavo.kernels.cuda.launch import kernel


@kernel()
def mix(x: tl.tensor) -> tl.tensor:
    """`mix` of reference_sampling on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@kernel()
def row_keys(seed: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """`keys` of reference_sampling: int64 values -> uint32 k0, k1."""
    a, b = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c, d = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    k0 = mix(mix(mix(mix(a ^ 0x9E3779B9) ^ b) ^ c) ^ d)
    k1 = mix(mix(mix(mix(a ^ 0x85EBCA6B) ^ b) ^ c) ^ d)
    return k0, k1


@kernel()
def random_bits(k0: tl.tensor, k1: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`bits` of reference_sampling: 31 random bits as int32, for int32 token ids."""
    x = (mix(token.to(tl.uint32)) ^ k0) * 0xCC9E2D51
    x ^= x >> 16
    signed = ((x + k1) * 0x1B873593).to(tl.int32, bitcast=True)
    return signed ^ (signed >> 15)


@kernel()
def gumbel(bits: tl.tensor) -> tl.tensor:
    """-log(-log1p(-u)) with u of reference_sampling, accurate in float32.

    log1p(-u) = log(w) * u / (1 - w) for w = 1 - u rounded, or -u where w is 1: the rounding of w cancels.
    """
    u = tl.minimum(bits.to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * tl.math.div_rn(u, tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(exponential)


@kernel()
def usable(logits: tl.tensor) -> tl.tensor:
    """float32 with -inf for NaN."""
    return tl.maximum(logits.to(tl.float32), float("-inf"))


@kernel()
def finite(top: tl.tensor) -> tl.tensor:
    """A highest logit that can be subtracted without making NaN."""
    return tl.where(top == float("-inf"), 0.0, tl.minimum(top, 3.4028234663852886e38))


@kernel()
def noise_bound(k0: tl.tensor, k1: tl.tensor, token: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """-log2(u) - 31, at least (up to 1e-5) gumbel / log(2) - 31."""
    x = random_bits(k0, k1, token).to(tl.float32) + 0.5
    if FAST:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log = tl.log2(x)
    return -log


@kernel()
def fetch(
    line: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    whole: tl.tensor,
    held: tl.tensor,
    begin: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Logits and ids of BLOCK of a set of tokens: `whole` ones of the row at `line` or `held` collected ones.

    One of the two numbers is 0. Beyond the set logits are -inf.
    """
    at = begin + tl.arange(0, BLOCK)
    value = usable(tl.load(line + at, mask=at < whole, other=float("-inf")))
    value = tl.where(at < held, tl.load(values + at, mask=at < held, other=float("-inf")), value)
    return value, tl.where(at < held, tl.load(ids + at, mask=at < held, other=0), at)


@kernel()
def best_of(
    bound: tl.tensor,
    line: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    whole: tl.tensor,
    held: tl.tensor,
    begin: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    score: tl.tensor,
    best: tl.tensor,
    best_id: tl.tensor,
    SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The highest score so far, with its token's logit and id, after the SIZE tokens from `begin` of a set.

    bound: their z / log(2) + `noise_bound`, -inf for what may not be drawn; the set is that of `fetch`. z is relative
    to `top`. A maximum is sought without its place, which is looked up only where it counts: half the work.
    """
    lane = tl.arange(0, SIZE)
    reach = tl.max(bound, 0)
    while (reach + 31.0) * 0.6931471805599453 + 1e-4 > score and reach > float("-inf"):
        i = tl.min(tl.where(bound == reach, lane, SIZE), 0)
        value, token = fetch(line, values, ids, whole, held, begin + i, 1)
        logit, token = tl.max(value, 0), tl.max(token, 0)
        new = tl.math.div_rn(logit - top, heat) + gumbel(random_bits(k0, k1, token))
        better = (new > score) | ((new == score) & (token < best_id))
        score = tl.where(better, new, score)
        best = tl.where(better, logit, best)
        best_id = tl.where(better, token, best_id)
        bound = tl.where(lane == i, float("-inf"), bound)
        reach = tl.max(bound, 0)
    return score, best, best_id
