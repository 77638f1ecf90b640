"""The draw and masks over the C kernels: `reference_sampling.sample` without a sort, `apply_masks` in one pass.

The random bits are the same; the noise's two logarithms may differ from torch's in the last bit, so that a draw differs
only where two scores are that close.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cpu.native import HALF, Masking, Sampling, functions, run

KINDS = (torch.float32, torch.float32, torch.float32, torch.int32, torch.int64, torch.int64)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    parameters = (temperature, top_p, min_p, top_k, seed, position)
    if not _taken(logits, parameters):
        return reference.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    return _draw(logits, parameters, None, None)


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
    parameters = (temperature, top_p, min_p, top_k, seed, position)
    given = (rows,) if last_token is None else (rows, last_token)
    if not _taken(logits, parameters) or any(t.dtype != torch.int64 or not t.is_contiguous() for t in given):
        return reference.sample_rows(
            logits,
            rows,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            position,
            filtered=filtered,
            last_token=last_token,
        )
    return _draw(logits, parameters, rows, last_token)


def apply_masks(logits: Tensor, at: Tensor, bits: Tensor) -> None:
    rows, vocab = len(at), logits.shape[1]
    kinds = (logits.dtype, at.dtype, bits.dtype) == (torch.float32, torch.int64, torch.int32)
    if not (kinds and logits.is_cpu and logits.stride(1) == 1 and at.is_contiguous() and bits.is_contiguous()):
        return reference.apply_masks(logits, at, bits)
    call = Masking(logits.data_ptr(), at.data_ptr(), bits.data_ptr(), rows, vocab, logits.stride(0), bits.shape[1])
    return run(functions().apply_masks, call, (rows - 1) * vocab)


def _taken(logits: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    if logits.dtype not in HALF or logits.device.type != "cpu" or logits.stride(1) != 1:
        return False
    return tuple(p.dtype for p in parameters) == KINDS and all(p.is_contiguous() for p in parameters)


def _draw(logits: Tensor, parameters: tuple[Tensor, ...], lines: Tensor | None, last_token: Tensor | None) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    draw = Sampling(
        logits.data_ptr(),
        *(p.data_ptr() for p in parameters),
        None if lines is None else lines.data_ptr(),
        None if last_token is None else last_token.data_ptr(),
        tokens.data_ptr(),
        rows,
        vocab,
        logits.stride(0),
        HALF[logits.dtype],
    )
    run(functions().sample, draw, (rows - 1) * vocab)  # one row is one thread's work
    return tokens
