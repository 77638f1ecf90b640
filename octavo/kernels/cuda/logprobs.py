"""Log-probabilities over a vocabulary: all of them, or the chosen token's and the k best, without a sort.

logsumexp(x) = m + log(sum exp(x - m)), m = max(x). Rows are split into chunks, a program each; a second launch joins a
row's chunks in a fixed order. For the best, every chunk gives its k best by taking the maximum k times, the lowest id
among equals, and the row's k best are among these.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cuda.launch import cdiv, contiguous, kernel, pdl, pow2, supported

CHUNK = 4096
MAX_K = 20
"""What serving APIs ask for at most; more goes to the reference."""


@kernel()
def _log_sums(
    x: tl.tensor,
    parts: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """parts [N, 2, chunks]: each chunk's maximum and its sum of exp(x - maximum)."""
    line, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + line * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    part = parts + line * 2 * chunks + chunk
    tl.store(part, top)
    tl.store(part + chunks, tl.sum(tl.exp(value - tl.where(top == float("-inf"), 0.0, top)), 0))


@kernel()
def _logsumexp(parts: tl.tensor, chunks: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """Joins parts [2, chunks] of a row."""
    among = tl.arange(0, CHUNKS)
    tops = tl.load(parts + among, mask=among < chunks, other=float("-inf"))
    sums = tl.load(parts + chunks + among, mask=among < chunks, other=0.0)
    top = tl.max(tops, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    return finite + tl.log(tl.sum(sums * tl.exp(tops - finite), 0))


@kernel()
def _subtract(
    x: tl.tensor,
    parts: tl.tensor,
    y: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    line, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + line * stride + at, mask=at < vocab, other=0.0).to(tl.float32)
    log_sum = _logsumexp(parts + line * 2 * chunks, chunks, CHUNKS)
    tl.store(y + line * vocab + at, (value - log_sum).to(y.dtype.element_ty), mask=at < vocab)


def log_softmax(x: Tensor) -> Tensor:
    """x [..., V] -> x - logsumexp(x) over the last dimension, in x's dtype; more or fewer than two go to torch."""
    if x.ndim != 2 or not supported(x):
        return torch.log_softmax(x, -1)
    lines, vocab = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((lines, vocab), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    chunks, dependent = cdiv(vocab, CHUNK), pdl()
    parts = torch.empty((lines, 2, chunks), dtype=torch.float32, device=x.device)
    grid = (lines, chunks)
    sizes = (x.stride(0), vocab, chunks)
    _log_sums[grid](x, parts, *sizes, CHUNK=CHUNK, PDL=dependent, launch_pdl=dependent, num_warps=8)
    _subtract[grid](
        x, parts, y, *sizes, CHUNK=CHUNK, CHUNKS=pow2(chunks), PDL=dependent, launch_pdl=dependent, num_warps=8
    )
    return y


@kernel("k")
def _chunk_best(
    logits: tl.tensor,
    chosen: tl.tensor,
    parts: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    k: tl.tensor,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """parts [N, 3, chunks]: maximum, sum, how many beat the chosen one's; values, ids [N, chunks * k]: the best."""
    line, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, CHUNK)
    at = chunk * CHUNK + lane
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    picked = tl.load(logits + line * stride + tl.load(chosen + line)).to(tl.float32)
    value = tl.load(logits + line * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    part = parts + line * 3 * chunks + chunk
    tl.store(part, top)
    tl.store(part + chunks, tl.sum(tl.exp(value - tl.where(top == float("-inf"), 0.0, top)), 0))
    tl.store(part + 2 * chunks, tl.sum((value > picked).to(tl.int32), 0).to(tl.float32))
    best = (line * chunks + chunk) * k
    open_ = at < vocab
    for i in range(k):
        high, _ = tl.max(value, 0, return_indices=True)
        # among equals the lowest, also where only -inf is left
        winner = tl.min(tl.where(open_ & (value == high), lane, CHUNK), 0)
        tl.store(values + best + i, tl.where(winner < CHUNK, high, float("-inf")))
        tl.store(ids + best + i, tl.where(winner < CHUNK, chunk * CHUNK + winner, -1))
        open_ = open_ & (lane != winner)
        value = tl.where(lane == winner, float("-inf"), value)


@kernel("k")
def _row_best(
    logits: tl.tensor,
    chosen: tl.tensor,
    parts: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    out_ids: tl.tensor,
    out_logprobs: tl.tensor,
    ranks: tl.tensor,
    stride: tl.tensor,
    chunks: tl.tensor,
    k: tl.tensor,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64)
    among, lane = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part = parts + line * 3 * chunks
    log_sum = _logsumexp(part, chunks, CHUNKS)
    higher = tl.sum(tl.load(part + 2 * chunks + among, mask=among < chunks, other=0.0).to(tl.int32), 0)
    token = tl.load(chosen + line)
    out = line * (k + 1)
    tl.store(ranks + line, higher.to(tl.int64) + 1)
    tl.store(out_ids + out, token)
    tl.store(out_logprobs + out, tl.load(logits + line * stride + token).to(tl.float32) - log_sum)
    count = chunks * k
    value = tl.load(values + line * count + lane, mask=lane < count, other=float("-inf"))
    token_of = tl.load(ids + line * count + lane, mask=lane < count, other=-1)
    open_ = token_of >= 0
    for i in range(k):
        high = tl.max(tl.where(open_, value, float("-inf")), 0)
        winner = tl.min(tl.where(open_ & (value == high), lane, SIZE - 1), 0)
        tl.store(out_ids + out + 1 + i, tl.max(tl.where(lane == winner, token_of, 0), 0).to(tl.int64))
        tl.store(out_logprobs + out + 1 + i, high - log_sum)
        open_ = open_ & (lane != winner)


def top_logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, 1+k] int64, log-probabilities [N, 1+k] float32, ranks [N] int64: see `reference_sampling.top_logprobs`.

    logits [N, V] of any float type, chosen [N] int64, k at most V. Lower ids come first among all equals.
    """
    lines, vocab = logits.shape
    picked = chosen.shape == (lines,) and contiguous(chosen)
    if not picked or k > min(MAX_K, vocab) or not supported(logits):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return reference.top_logprobs(wide, chosen, k)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out_ids = torch.empty((lines, 1 + k), dtype=torch.int64, device=logits.device)
    out_logprobs = torch.empty((lines, 1 + k), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(lines, dtype=torch.int64, device=logits.device)
    if not lines:
        return out_ids, out_logprobs, ranks
    chunks, dependent = cdiv(vocab, CHUNK), pdl()
    parts = torch.empty((lines, 3, chunks), dtype=torch.float32, device=logits.device)
    values = torch.empty((lines, chunks * k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((lines, chunks * k), dtype=torch.int32, device=logits.device)
    _chunk_best[(lines, chunks)](
        logits,
        chosen,
        parts,
        values,
        ids,
        logits.stride(0),
        vocab,
        chunks,
        k,
        CHUNK=CHUNK,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=8,
    )
    _row_best[(lines,)](
        logits,
        chosen,
        parts,
        values,
        ids,
        out_ids,
        out_logprobs,
        ranks,
        logits.stride(0),
        chunks,
        k,
        CHUNKS=pow2(chunks),
        SIZE=max(2, pow2(chunks * MAX_K)),
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=4,
    )
    return out_ids, out_logprobs, ranks
