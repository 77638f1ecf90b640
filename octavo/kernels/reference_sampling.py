"""Reference sampling kernels in plain torch: explicit tensors in, tensors out, each overridable one to one.

Owns the random numbers, the choice of a token from logits, penalties and log-probabilities. Does not own who samples
with which parameters (octavo.sampling). These functions may read a few values on the host (free on a CPU, a
synchronisation on a GPU); overrides for GPUs do not.

Random numbers are counter-based: a function of (seed, position, token id) alone, in 32-bit integer arithmetic, so every
device, rank and batch composition draws the same ones. All arithmetic below is modulo 2**32:

    mix(x):  x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16     (a bijection, "lowbias32")
    keys:    k0, k1 = 0x9e3779b9, 0x85ebca6b; for w in (seed low, seed high, position low, position high):
             k0 = mix(k0 ^ w), k1 = mix(k1 ^ w)
    bits:    x = (mix(token id) ^ k0) * 0xcc9e2d51; x ^= x >> 16; x = (x + k1) * 0x1b873593; x ^= x >> 15

Shifts are logical but the very last, which copies the sign and so leaves 31 bits, non-negative as int32. In float32:

    u = min(float(x) * 2**-31 + 2**-32, 1 - 2**-24)          in (0, 1), spaced by 2**-31 near 0
    gumbel = -log(-log1p(-u))                                 large where u is small, so the spacing is fine there

Integers are the same everywhere; the two logarithms may differ in the last bit between devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_WIDTHS = (512, 4096)
"""Highest tokens of a row that are looked at, in turn, before all of it is sorted."""
_TIE_SLACK = 16
_CHUNK = 1 << 19
"""Elements of a slice whose temporaries stay in a CPU's cache."""


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


_M0, _M1 = _signed(0xCC9E2D51), _signed(0x1B873593)


def _mix(x: Tensor) -> Tensor:
    """`mix` of the module docstring on int64 values in [0, 2**32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _keys(seed: Tensor, position: Tensor) -> Tensor:
    """int64 [S] seeds and positions -> int32 [S, 2], k0 and k1 of each row."""
    keys = torch.tensor([[0x9E3779B9], [0x85EBCA6B]], device=seed.device).repeat(1, len(seed))
    for word in (seed & _MASK, (seed >> 32) & _MASK, position & _MASK, (position >> 32) & _MASK):
        keys = _mix(keys ^ word)
    return keys.T.to(torch.int32)


def _bits(keys: Tensor, mixed: Tensor) -> Tensor:
    """`bits` of the module docstring: int32 [S, C] of keys [S, 2] and mix(token id) as int32 [C] or [S, C]."""
    x = mixed ^ keys[:, :1]
    x.mul_(_M0)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x.add_(keys[:, 1:]).mul_(_M1)
    x ^= x >> 15
    return x


def _uniform(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2.0**-31).add_(2.0**-32).clamp_max_(1.0 - 2.0**-24)


def _gumbel(bits: Tensor) -> Tensor:
    return _uniform(bits).neg_().log1p_().neg_().log_().neg_()


def random_bits(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """31 random bits for each (row, token), as int32 [S, C].

    seed, position: [S] int64; token_ids: [C] or [S, C] int64, at least 0 and below 2**32.
    """
    return _bits(_keys(seed, position), _mix(token_ids).to(torch.int32))


def uniform(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [S, C] in the open interval (0, 1); arguments as for `random_bits`."""
    return _uniform(random_bits(seed, position, token_ids))


def gumbel(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [S, C]; arguments as for `random_bits`."""
    return _gumbel(random_bits(seed, position, token_ids))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One token id per row, int64 [S]; `logits` is left as it is.

    logits: [S, V], the arithmetic is done in its dtype, half types in float32; temperature, top_p, min_p: [S] float32;
    top_k: [S] int32, below 1 or at least V for off; seed, position: [S] int64 (`random_bits`).

    Temperature 0 takes the highest logit, the lowest id among equals. Otherwise z = (logits - max) / temperature, and
    the draw is argmax(z + gumbel), which picks each token with its softmax probability (the Gumbel-max trick), among
    the tokens that pass, in this order:
      min_p   probability at least min_p times the highest one: z >= log(min_p)
      top_k   z at least the k-th highest
      top_p   the tokens more likely than this one hold less than top_p of what the steps before left
    Equals are kept or dropped together, so nothing depends on the order of a sort; the most likely token always stays.
    A row with NaN, or with every logit -inf, gives some id in range.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    best, tokens = logits.max(-1)
    drawn = temperature > 0
    if not bool(drawn.any()):
        return tokens
    vocab = logits.shape[1]
    rows = _Rows(logits, best, temperature, top_k, top_p, min_p, _keys(seed, position))
    mixed = _mix(torch.arange(vocab, device=logits.device)).to(torch.int32)
    narrow = drawn & (((top_k > 0) & (top_k < vocab)) | (top_p < 1))
    for part in _slices(drawn & ~narrow, vocab):
        tokens[part] = _draw(rows.take(part), mixed)
    if bool(narrow.any()):
        part = narrow.nonzero()[:, 0]
        tokens[part] = _draw_narrow(rows.take(part), mixed)
    return tokens


def sample_rows(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    filtered: bool = True,
    last_token: Tensor | None = None,
) -> Tensor:
    """`sample` where line i of logits [S, V] has the parameters at rows[i] of tables [R+1]; position stays [S].

    With filtered=False no row has top_k, top_p or min_p. Writes last_token[rows[i]] too, where given [R+1] int64.
    """
    tokens = sample(logits, temperature[rows], top_k[rows], top_p[rows], min_p[rows], seed[rows], position)
    if last_token is not None:
        last_token[rows] = tokens
    return tokens


class _Rows(NamedTuple):
    """Rows of `sample`: its arguments, each row's highest logit, and the keys of seed and position."""

    logits: Tensor
    best: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(*(tensor[rows] for tensor in self))

    def scaled(self, logits: Tensor) -> Tensor:
        """z of `sample`, for all or some logits of each row."""
        return (logits - self.best[:, None]).div_(self.temperature[:, None].to(logits.dtype))

    def floor(self) -> Tensor:
        """The lowest z that min_p keeps, [S, 1]; -inf where it is off."""
        return self.min_p.to(self.logits.dtype).log()[:, None]


def _slices(mask: Tensor, vocab: int) -> Iterator[Tensor]:
    """Indices of the rows where `mask` is set, `_CHUNK` elements of logits at a time."""
    rows = mask.nonzero()[:, 0]
    return (part for part in torch.split(rows, max(1, _CHUNK // vocab)) if part.numel())


def _draw(rows: _Rows, mixed: Tensor) -> Tensor:
    """`sample` for rows without top_k and top_p: noise for every token, no sorting."""
    scores = rows.scaled(rows.logits)
    if bool((rows.min_p > 0).any()):
        scores.masked_fill_(scores < rows.floor(), float("-inf"))
    scores += _gumbel(_bits(rows.keys, mixed))
    return scores.max(-1).indices


def _draw_narrow(rows: _Rows, mixed: Tensor) -> Tensor:
    """`sample` for rows with top_k or top_p: noise for the kept tokens only.

    Looks at a row's highest tokens first, and at more or all of them only where more are kept.
    """
    vocab = rows.logits.shape[1]
    limited = (rows.top_k > 0) & (rows.top_k < vocab)
    mass = torch.zeros(len(limited), dtype=torch.float64, device=limited.device)
    for part in _slices(~limited, vocab):
        some = rows.take(part)
        z = some.scaled(some.logits)
        z.masked_fill_(z < some.floor(), float("-inf"))
        mass[part] = z.exp_().sum(-1, dtype=torch.float64)
    short = bool((limited & (rows.top_k < _WIDTHS[0])).all())
    width = min(vocab, 1 + int(rows.top_k.max()) if short else _WIDTHS[0])
    tokens, whole = _draw_from(rows, mixed, limited, mass, width)
    for width in (*_WIDTHS[1:], vocab):
        for part in _slices(~whole, vocab):
            tokens[part], whole[part] = _draw_from(rows.take(part), mixed, limited[part], mass[part], min(width, vocab))
    return tokens


def _draw_from(rows: _Rows, mixed: Tensor, limited: Tensor, mass: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the `width` highest of each row, and whether these hold all that is kept."""
    vocab = rows.logits.shape[1]
    values, ids = rows.logits.sort(descending=True) if width == vocab else rows.logits.topk(width)
    z = rows.scaled(values)
    kept, whole = _kept(rows, z, limited, mass)
    scores = (z + _gumbel(_bits(rows.keys, mixed[ids]))).masked_fill_(~kept, float("-inf"))
    highest = scores == scores.amax(-1, keepdim=True)
    return ids.masked_fill_(~highest, vocab - 1).amin(-1), whole if width < vocab else torch.ones_like(whole)


def _kept(rows: _Rows, z: Tensor, limited: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the candidates z [S, C], in falling order, pass the filters; and per row whether none can lie beyond.

    Tokens with z = -inf cannot be drawn, so they never pass: a forbidden rest of the vocabulary needs no look beyond.
    limited: [S] bool, rows with top_k. mass: [S] float64, for the others the sum of exp(z) over all that pass min_p.
    """
    width = z.shape[1]
    kept = (z >= rows.floor()) & (z > float("-inf"))
    last = (rows.top_k.to(torch.int64) - 1).clamp_(0, width - 1)[:, None]
    kept &= (z >= z.gather(1, last)) | ~(limited & (rows.top_k <= width))[:, None]
    counted = ~limited | ~kept[:, -1]
    running = z.to(torch.float64).exp().masked_fill_(~kept, 0.0).cumsum(-1)
    total = torch.where(limited, running[:, -1], mass)
    share = torch.where(rows.top_p < 1, rows.top_p.to(torch.float64) * total, float("inf"))
    before = running.roll(1, -1)
    before[:, 0] = 0.0
    inside = kept & (before < share[:, None])
    kept &= z >= z.gather(1, (inside.sum(-1, keepdim=True) - 1).clamp_(min=0))
    return kept, counted & ~kept[:, -1]


def apply_penalties(
    logits: Tensor,
    at: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Penalises tokens already used, in place, in rows `at` of logits [S, V]; row at[i] has the state at slots[i].

    at, slots: [N] int64, `at` without repeats. counts: [C, V] int32, how often each token was generated; in_prompt:
    [C, V] bool; presence, frequency, repetition: [C] float32. First the repetition penalty (CTRL, arXiv:1909.05858)
    for tokens of prompt and output: positive logits are divided by it, others multiplied. Then `frequency` times the
    count is subtracted, and `presence` from tokens generated at least once.
    """
    step = max(1, _CHUNK // logits.shape[1])
    for part, slot in zip(torch.split(at, step), torch.split(slots, step), strict=True):
        rows, used = logits[part], counts[slot]
        factor = repetition[slot, None].to(rows.dtype)
        if bool((factor != 1).any()):
            seen = (used > 0) | in_prompt[slot]
            rows = torch.where(seen, torch.where(rows > 0, rows / factor, rows * factor), rows)
        rows -= used * frequency[slot, None].to(rows.dtype)
        rows -= (used > 0) * presence[slot, None].to(rows.dtype)
        logits[part] = rows


def apply_masks(logits: Tensor, at: Tensor, bits: Tensor) -> None:
    """Forbids what a grammar does not allow, in place, in rows `at` of logits [S, V].

    at: [M] int64 without repeats; bits: [M, ceil(V / 32)] int32 on the same device, bit i % 32 of word i // 32 allows
    token i. Where none of the allowed tokens is left, all of them get the same logit.
    """
    vocab = logits.shape[1]
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    step = len(at) if logits.is_cuda else max(1, _CHUNK // vocab)
    for part, words in zip(torch.split(at, step), torch.split(bits, step), strict=True):
        octets = words.contiguous().view(torch.uint8)  # of little-endian words
        allowed = ((octets[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocab]
        rows = logits[part].masked_fill_(~allowed, float("-inf"))
        lost = rows.amax(-1, keepdim=True) == float("-inf")
        logits[part] = rows.masked_fill_(lost & allowed, 0.0)


def top_logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen token and the k best of each row.

    logits: [N, V] float32 or float64; chosen: [N] int64. Returns ids [N, 1+k] int64, logprobs [N, 1+k] in the logits'
    dtype, ranks [N] int64. Column 0 is the chosen token, then the best in falling order, lower ids first among equals
    (up to `_TIE_SLACK` equals around the k-th). A rank is 1 + the number of tokens more likely than the chosen one.
    """
    picked = logits.gather(1, chosen[:, None])
    ranks = (logits > picked).sum(-1) + 1
    take = min(k + _TIE_SLACK, logits.shape[1]) if k else 0
    values, ids = logits.topk(take)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    logprobs = torch.cat([picked, values[:, :k]], 1) - logits.logsumexp(-1, keepdim=True)
    return torch.cat([chosen[:, None], ids[:, :k]], 1), logprobs, ranks
