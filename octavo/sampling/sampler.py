"""The sampler: rows' parameters on the device, the transforms, the draw, log-probabilities.

Owns the order of these steps. A row is named by its index in the engine's row state; the last one, max_rows, is the
padding row, which is greedy and never added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.core.plan import Admit, Masks
from octavo.core.request import TokenLogprobs
from octavo.kernels import Kernels, reference
from octavo.sampling.rows import Array, Rows, upload
from octavo.sampling.transforms import standard_transforms

HALF_TYPES = (torch.bfloat16, torch.float16)
_SLICE = 1 << 23
"""Logits looked at together by `prompt_logprobs`."""


@dataclass(frozen=True)
class Samples:
    """The tokens of one call and, for the indices that want them, their log-probabilities."""

    tokens: Tensor
    """[S] int64, on the device."""
    wanted: tuple[tuple[int, int], ...] = ()
    """(index into S, how many of the best) of those with log-probabilities."""
    gathered: tuple[Tensor, ...] = ()
    """Log-probabilities of the wanted (token ids, values, ranks), on the device; nothing when none are."""

    def host_logprobs(self, gathered: Sequence[Tensor] | None = None) -> dict[int, TokenLogprobs]:
        """Keyed by index into S. `gathered` is a copy on the host; without it this waits for the device."""
        if not self.wanted:
            return {}
        found = _to_host(gathered or self.gathered, (k for _, k in self.wanted))
        return {at: entry for (at, _), entry in zip(self.wanted, found, strict=True)}


class Sampler:
    """Chooses the next token of each row.

    Random numbers depend on the row's seed and the token's position alone (octavo.kernels.reference_sampling).
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        eos_token_ids: tuple[int, ...],
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        self._kernels = kernels
        self._device = device
        self._vocab_size = vocab_size
        self._transforms = standard_transforms(vocab_size, max_rows, eos_token_ids, kernels, device)
        self._host: dict[str, Array] = {
            "temperature": np.zeros(max_rows + 1, np.float32),
            "top_k": np.zeros(max_rows + 1, np.int32),
            "top_p": np.ones(max_rows + 1, np.float32),
            "min_p": np.zeros(max_rows + 1, np.float32),
            "seed": np.zeros(max_rows + 1, np.int64),
        }
        self._state = {name: upload(array.copy(), device) for name, array in self._host.items()}
        self._filtered = np.zeros(max_rows + 1, np.bool_)
        self._stale: set[int] = set()
        self._logprobs = np.full(max_rows + 1, -1, np.int64)

    def add(self, admit: Admit) -> None:
        """A sequence takes a row. With `params.uses_history`, `admit.history` must hold its `num_tokens` tokens."""
        row, params = admit.row, admit.params
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
        seed = (admit.seed + 2**63) % 2**64 - 2**63
        values = (params.temperature, top_k, params.top_p, params.min_p, seed)
        for array, value in zip(self._host.values(), values, strict=True):
            array[row] = value
        self._filtered[row] = top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._stale.add(row)
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        for transform in self._transforms:
            transform.remove(row)
            transform.add(row, admit)

    def remove(self, row: int) -> None:
        """The row is free; nothing of it stays but numbers that nobody reads."""
        self._logprobs[row] = -1
        self._host["temperature"][row] = 0.0
        for transform in self._transforms:
            transform.remove(row)

    def __call__(
        self,
        logits: Tensor,
        rows: Rows,
        positions: Tensor,
        *,
        index: Tensor | None = None,
        last_token: Tensor | None = None,
        masks: Masks | None = None,
    ) -> Samples:
        """Samples one token for each line of `logits`, which the transforms may overwrite.

        logits: [S, V] of any float type on the device (half types are widened where they are changed); rows: [S] on
        the host, `index` the same on the device where they lie there already; positions: [S] int64 on the device, the
        index that the token will have in its sequence, prompt included. A row may come several times, at increasing
        positions (verification of drafts), unless its params.uses_history. `last_token` [R+1] gets each row's token.
        `masks` has the lines of `logits` that follow a grammar; it is applied last, so that the grammar always holds.
        """
        lines = np.nonzero(self._logprobs[rows] >= 0)[0]
        active = [transform for transform in self._transforms if len(transform)]
        if (active or len(lines)) and logits.dtype in HALF_TYPES:
            logits = logits.float()
        at = upload(lines, self._device) if len(lines) else None
        raw = None if at is None else logits[at]
        for transform in active:
            transform.apply(logits, rows, positions)
        if masks is not None:
            at_lines, bits = (upload(array, self._device) for array in (masks.lines.astype(np.int64), masks.bits))
            self._kernels.apply_masks(logits, at_lines, bits)
        tokens = self._choose(logits, rows, positions, index, last_token)
        if raw is None or at is None:
            return Samples(tokens)
        ks = self._logprobs[rows[lines]]
        gathered = self._kernels.top_logprobs(raw, tokens[at], int(ks.max()))
        return Samples(tokens, tuple(zip(lines.tolist(), ks.tolist(), strict=True)), gathered)

    def observe(self, rows: Rows, tokens: Tensor) -> None:
        """Accepted tokens [N] int64, on the device, of rows [N] become part of their sequences."""
        for transform in self._transforms:
            if len(transform):
                transform.observe(rows, tokens)

    def is_plain(self, rows: Rows) -> bool:
        """Whether these rows need no more than `draw`: no transform, no log-probabilities."""
        wants = self._logprobs.max() >= 0 and (self._logprobs[rows] >= 0).any()  # mostly no row at all does
        return not wants and not any(map(len, self._transforms))

    def is_filtered(self, rows: Rows) -> bool:
        """Whether any of these rows has top_k, top_p or min_p."""
        return bool(self._filtered[rows].any())

    def refresh(self) -> None:
        """Brings the parameters of rows added since the last call to the device."""
        if self._stale:
            stale = np.array(sorted(self._stale))
            at = upload(stale, self._device)
            for name, array in self._host.items():
                self._state[name][at] = upload(array[stale], self._device)
            self._stale.clear()

    def draw(
        self, logits: Tensor, index: Tensor, positions: Tensor, *, filtered: bool, last_token: Tensor | None = None
    ) -> Tensor:
        """The draw alone, from `refresh`ed parameters: all on the device, so it can be captured. int64 [S]."""
        return self._kernels.sample_rows(
            logits, index, **self._state, position=positions, filtered=filtered, last_token=last_token
        )

    def _choose(
        self, logits: Tensor, rows: Rows, positions: Tensor, index: Tensor | None, last_token: Tensor | None
    ) -> Tensor:
        self.refresh()
        if index is None:
            index = upload(rows.astype(np.int64), self._device)
        return self.draw(logits, index, positions, filtered=self.is_filtered(rows), last_token=last_token)


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int, kernels: Kernels = reference) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens: targets [N] int64 under logits [N, V]. Waits for the device.

    Works in slices, so that temporaries stay small beside the logits.
    """
    step = max(1, _SLICE // logits.shape[1])
    found: list[TokenLogprobs] = []
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        wide = logits[part].float() if logits.dtype in HALF_TYPES else logits[part]
        gathered = kernels.top_logprobs(wide, targets[part], k)
        found += _to_host(gathered, (k for _ in range(len(gathered[2]))))
    return found


def _to_host(gathered: Sequence[Tensor], ks: Iterable[int]) -> list[TokenLogprobs]:
    ids, logprobs, ranks = (tensor.tolist() for tensor in gathered)
    return [
        TokenLogprobs(row_ids[: 1 + k], row_logprobs[: 1 + k], rank)
        for row_ids, row_logprobs, rank, k in zip(ids, logprobs, ranks, ks, strict=True)
    ]
