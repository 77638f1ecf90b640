"""The draw of `reference_sampling.sample` without a sort, without a look at the host, in two launches.

`_draw` splits each row into chunks, a program each, and writes every chunk's best token (gumbel.py) and highest logit.
`_finish`, a program a row, takes the best of these, and for rows with top_k, top_p or min_p checks that it passes
(filters.py). Within a chunk z is relative to the chunk's highest logit, `_finish` recomputes the winners' scores
relative to the row's. Greedy rows compare logits. What a row needs is decided on the device, so one captured graph
serves all rows; a chunk's size never depends on the batch, so neither does a draw.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cuda.filters import CAPACITY, PIECE, collect, masses, narrow, pick, value_of
from octavo.kernels.cuda.gumbel import best_of, finite, gumbel, noise_bound, random_bits, row_keys, usable
from octavo.kernels.cuda.launch import INTERPRET, cdiv, contiguous, kernel, pdl, pow2, supported

CHUNK = 2048
"""Tokens of a program of `_draw`; part of what a draw means in its last bit, hence not tuned to the batch."""
DRAW_WARPS = 4
DRAW_REGISTERS: int | None = 64
"""Most registers of a thread of `_draw`; None leaves it to the compiler."""
FILTER_BLOCK, SEARCH_BLOCK, FILTER_WARPS = 4096, 1024, 16
"""Tokens at a time where a row with filters is looked at, or searched with 16 pivots."""


@kernel("offset")
def _draw(
    logits: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    parts: tl.tensor,
    maxima: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    offset: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    FILTERED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """parts [S, 3, chunks] int32: a chunk's highest logit and its best token's logit (as bits) and id.

    maxima [S, chunks * CHUNK / PIECE]: highest logits of its pieces, for rows with top_k.
    """
    line, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, CHUNK)
    ids = chunk * CHUNK + at
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = line
    if ROWS:
        row = tl.load(rows + line).to(tl.int64)
    heat = tl.load(temperature + row)
    line_logits = logits + line * stride
    value = usable(tl.load(line_logits + ids, mask=ids < vocab, other=float("-inf")))
    top = tl.max(value, 0)
    best = top
    best_id = chunk * CHUNK
    if heat <= 0:
        best_id += tl.min(tl.where(value == top, at, CHUNK - 1), 0)
    else:
        k0, k1 = row_keys(tl.load(seed + row), tl.load(position + line) + offset)
        highest = finite(top)
        bound = (value - highest) * tl.minimum(1.4426950408889634 / heat, 1e30) + noise_bound(k0, k1, ids, FAST)
        none = tl.full((), float("-inf"), tl.float32)
        begin, nothing = chunk * CHUNK, tl.full((), 0, tl.int32)
        _score, best, best_id = best_of(
            bound, line_logits, parts, parts, vocab, nothing, begin, highest, heat, k0, k1, none, none, begin, CHUNK
        )
        if FILTERED:
            k = tl.load(top_k + row)
            if (k > 0) & (k < vocab):
                PIECES: tl.constexpr = CHUNK // PIECE
                at_piece = maxima + (line * chunks + chunk) * PIECES + tl.arange(0, PIECES)
                tl.store(at_piece, tl.max(tl.reshape(value, [PIECES, PIECE]), 1))
    part = parts + line * 3 * chunks + chunk
    tl.store(part, top.to(tl.int32, bitcast=True))
    tl.store(part + chunks, best.to(tl.int32, bitcast=True))
    tl.store(part + 2 * chunks, best_id)


@kernel("offset")
def _finish(
    logits: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    parts: tl.tensor,
    maxima: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    last_token: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    offset: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COMMIT: tl.constexpr,
    FILTERED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The best of a row's chunks, then the filters. values, ids [S, CAPACITY] are scratch."""
    line = tl.program_id(0).to(tl.int64)
    among = tl.arange(0, CHUNKS)
    inside = among < chunks
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = line
    if ROWS:
        row = tl.load(rows + line).to(tl.int64)
    heat = tl.load(temperature + row)
    drawn = heat > 0
    heat = tl.where(drawn, heat, 1.0)
    k0, k1 = row_keys(tl.load(seed + row), tl.load(position + line) + offset)
    part = parts + line * 3 * chunks + among
    top = finite(tl.max(tl.load(part, mask=inside, other=-8388608).to(tl.float32, bitcast=True), 0))
    logit = tl.load(part + chunks, mask=inside, other=-8388608).to(tl.float32, bitcast=True)
    winners = tl.load(part + 2 * chunks, mask=inside, other=0)
    score = tl.math.div_rn(logit - top, heat) + gumbel(random_bits(k0, k1, winners))
    score = tl.where(drawn, score, logit)
    _high, winner = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.max(tl.where(among == winner, winners, 0), 0)
    if FILTERED and drawn:
        best = tl.max(tl.where(among == winner, logit, float("-inf")), 0)
        k, p, floor = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        line_logits = logits + line * stride
        values += line * CAPACITY
        ids += line * CAPACITY
        cut = tl.where(floor > 0, tl.log(tl.where(floor > 0, floor, 1.0)), float("-inf"))
        whole, held = vocab, tl.full((), 0, tl.int32)
        if (k > 0) & (k < vocab):
            pieces = chunks * PIECES
            if k <= pieces:
                held = collect(
                    line_logits,
                    maxima + line * pieces,
                    values,
                    ids,
                    pieces,
                    vocab,
                    k,
                    CHUNKS * PIECES,
                    PIECE,
                    CAPACITY,
                    SEARCH_BLOCK,
                )
                whole = tl.where(held > 0, 0, vocab)
            _before, key = narrow(line_logits, values, ids, whole, held, k, 64, SEARCH_BLOCK)
            cut = tl.maximum(cut, tl.math.div_rn(value_of(key.to(tl.int32)) - top, heat))
        z = tl.math.div_rn(best - top, heat)
        if z < cut:
            never = tl.full((), float("-inf"), tl.float32)
            best, token = pick(line_logits, values, ids, whole, held, top, heat, cut, never, k0, k1, BLOCK, FAST)
        if p < 1:
            z = tl.math.div_rn(best - top, heat)
            total, above = masses(line_logits, values, ids, whole, held, top, heat, cut, z, BLOCK)
            while (above >= p * total) & (above > 0):
                best, token = pick(line_logits, values, ids, whole, held, top, heat, cut, z, k0, k1, BLOCK, FAST)
                z = tl.math.div_rn(best - top, heat)
                total, above = masses(line_logits, values, ids, whole, held, top, heat, cut, z, BLOCK)
    tl.store(tokens + line, token.to(tl.int64))
    if COMMIT:
        tl.store(last_token + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One token id per row, int64 [S]: see `reference_sampling.sample`. Logits of half types are taken too."""
    return sample_rows(logits, None, temperature, top_k, top_p, min_p, seed, position)


def sample_rows(
    logits: Tensor,
    rows: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    offset: int = 0,
    filtered: bool = True,
    tokens: Tensor | None = None,
    last_token: Tensor | None = None,
) -> Tensor:
    """`sample` where line i of logits [S, V] has the parameters at rows[i] of tables [R+1]; position stays [S].

    rows: [S] integers, or None if tables have a line's parameters at its own index. The random numbers are those of
    position + offset. With filtered=False no row may have top_k, top_p or min_p, which are then not looked at. Writes
    into `tokens` [S] int64 if given, and with `last_token` [R+1] int64 also last_token[rows[i]].
    """
    lines, vocab = logits.shape
    device = logits.device
    tables = (temperature, top_k, top_p, min_p, seed)
    given = [tensor for tensor in (rows, position, tokens, last_token) if tensor is not None]
    if not supported(logits) or not contiguous(*tables, *given):
        at = torch.arange(lines, device=device) if rows is None else rows
        wide = logits if logits.dtype == torch.float64 else logits.float()
        found = reference.sample_rows(wide, at, *tables, position + offset, last_token=last_token)
        return found if tokens is None else tokens.copy_(found)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if tokens is None:
        tokens = torch.empty(lines, dtype=torch.int64, device=device)
    if not lines:
        return tokens
    chunks, pieces = cdiv(vocab, CHUNK), CHUNK // PIECE
    held = CAPACITY if filtered else 0
    parts = torch.empty((lines, 3, chunks), dtype=torch.int32, device=device)
    maxima = torch.empty((lines, chunks * pieces if filtered else 0), dtype=torch.float32, device=device)
    values = torch.empty((lines, held), dtype=torch.float32, device=device)
    ids = torch.empty((lines, held), dtype=torch.int32, device=device)
    dependent, where = pdl(), position if rows is None else rows
    _draw[(lines, chunks)](
        logits,
        where,
        temperature,
        top_k,
        seed,
        position,
        parts,
        maxima,
        logits.stride(0),
        vocab,
        offset,
        chunks,
        CHUNK=CHUNK,
        PIECE=PIECE,
        ROWS=rows is not None,
        FILTERED=filtered,
        FAST=not INTERPRET,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=DRAW_WARPS,
        maxnreg=DRAW_REGISTERS,
    )
    _finish[(lines,)](
        logits,
        where,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        parts,
        maxima,
        values,
        ids,
        tokens,
        tokens if last_token is None else last_token,
        logits.stride(0),
        vocab,
        offset,
        chunks,
        CHUNKS=pow2(chunks),
        PIECES=pieces,
        PIECE=PIECE,
        CAPACITY=CAPACITY,
        BLOCK=FILTER_BLOCK,
        SEARCH_BLOCK=SEARCH_BLOCK,
        ROWS=rows is not None,
        COMMIT=last_token is not None,
        FILTERED=filtered,
        FAST=not INTERPRET,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=FILTER_WARPS if filtered else 4,
    )
    return tokens
