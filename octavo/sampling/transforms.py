"""Changes to the logits that requests ask for, each a class that holds state only for the rows that use it.

Under overlap the host does not know the last token when it samples the next, so whatever depends on generated tokens
lives on the device and `observe` updates it there. Transforms are applied in vLLM's order: allowed ids, bad words,
minimum length, bias, penalties. They must leave a token to choose; where they forbid all of them, the choice is some
id in range.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.core.plan import Admit
from octavo.kernels import Kernels
from octavo.sampling.rows import Entries, Rows, Slots, upload

_NEVER = float("-inf")


class LogitsTransform(Protocol):
    """One kind of change. Costs nothing while its length, the number of rows that use it, is 0."""

    def __len__(self) -> int: ...

    def add(self, row: int, admit: Admit) -> None:
        """Sets up a row, if its parameters use this transform."""

    def remove(self, row: int) -> None:
        """Forgets a row, known or not."""

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        """Changes logits [S, V] in place; arguments as for `Sampler.__call__`."""

    def observe(self, rows: Rows, tokens: Tensor) -> None:
        """Takes in the accepted tokens [N] int64 of `rows` [N], each row at most once."""


class _Stateless:
    """A transform whose rows keep only lists made from their parameters."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._entries = Entries(max_rows, device)

    def __len__(self) -> int:
        return len(self._entries)

    def remove(self, row: int) -> None:
        self._entries.drop(row)

    def observe(self, rows: Rows, tokens: Tensor) -> None:
        """Nothing depends on earlier tokens."""


class AllowedTokens(_Stateless):
    """`allowed_token_ids`: every other token is forbidden."""

    def add(self, row: int, admit: Admit) -> None:
        if admit.params.allowed_token_ids:
            self._entries.set(row, np.array(admit.params.allowed_token_ids, np.int64))

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        if packed := self._entries.pack(rows):
            lines, at, ids = packed
            kept = logits[at, ids]
            logits.index_fill_(0, lines, _NEVER)
            logits[at, ids] = kept


class MinTokens(_Stateless):
    """`min_tokens`: what ends a sequence (EOS and stop token ids) is forbidden until that many are generated."""

    def __init__(self, vocab_size: int, max_rows: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        super().__init__(max_rows, device)
        self._vocab_size = vocab_size
        self._eos = eos_token_ids

    def add(self, row: int, admit: Admit) -> None:
        first_end = admit.prompt_len + admit.params.min_tokens
        stops = {*self._eos, *(admit.params.stop_token_ids or ())}
        ids = np.array([token for token in stops if token < self._vocab_size], np.int64)
        if first_end > admit.num_tokens and len(ids):
            self._entries.set(row, ids, np.full(len(ids), first_end))

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        if packed := self._entries.pack(rows):
            _, at, ids, first_end = packed
            logits[at, ids] = logits[at, ids].masked_fill(positions[at] < first_end, _NEVER)


class LogitBias(_Stateless):
    """`logit_bias`: added to the logits of the tokens that it names."""

    def add(self, row: int, admit: Admit) -> None:
        if bias := admit.params.logit_bias:
            self._entries.set(row, np.array([*bias], np.int64), np.array([*bias.values()], np.float64))

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        if packed := self._entries.pack(rows):
            _, at, ids, amounts = packed
            logits[at, ids] += amounts.to(logits.dtype)


class BadWords:
    """`bad_words`: the last token of each sequence of ids is forbidden where the generated text ends in the others.

    Only generated tokens count, as in vLLM: a bad word that begins in the prompt may be completed. The device keeps
    each row's last generated tokens, as many as its longest word needs, -1 before the first.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._entries = Entries(max_rows, device)
        self._slots = Slots(max_rows)
        self._recent = torch.empty(0, 0, dtype=torch.int64, device=device)
        """[slots, width], the latest on the right."""

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, row: int, admit: Admit) -> None:
        words = admit.bad_word_ids
        if not words:
            return
        width = max(len(word) for word in words) - 1
        prefixes = np.full((len(words), width), -1, np.int64)
        for prefix, word in zip(prefixes, words, strict=True):
            prefix[width - len(word) + 1 :] = word[:-1]
        slot = self._slots.take(row)
        ids = np.array([word[-1] for word in words], np.int64)
        self._entries.set(row, np.full(len(words), slot), ids, prefixes)
        self._recent = _grown(self._recent, self._slots.size, width)
        assert admit.history is not None
        generated = [-1] * self._recent.shape[1] + admit.history[admit.prompt_len :]
        last = generated[len(generated) - self._recent.shape[1] :]
        self._recent[slot] = torch.tensor(last, dtype=torch.int64)

    def remove(self, row: int) -> None:
        self._entries.drop(row)
        self._slots.release(row)
        if not len(self):
            self._recent = self._recent.new_empty(0, 0)

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        if packed := self._entries.pack(rows):
            _, at, slots, ids, prefixes = packed
            recent = self._recent[slots, self._recent.shape[1] - prefixes.shape[1] :]
            hit = ((recent == prefixes) | (prefixes < 0)).all(-1)
            amounts = torch.zeros_like(hit, dtype=logits.dtype).masked_fill_(hit, _NEVER)
            logits.index_put_((at, ids), amounts, accumulate=True)

    def observe(self, rows: Rows, tokens: Tensor) -> None:
        at, found = self._slots.find(rows)
        if len(at) and self._recent.shape[1]:
            slots = upload(found, tokens.device)
            latest = tokens[upload(at, tokens.device), None]
            self._recent[slots] = torch.cat([self._recent[slots, 1:], latest], 1)


class Penalties:
    """`presence_penalty` and `frequency_penalty` over generated tokens, `repetition_penalty` over the prompt's too.

    The device keeps, for each row that uses them, V counts and a mask of the prompt's tokens.
    """

    def __init__(self, vocab_size: int, max_rows: int, kernels: Kernels, device: torch.device) -> None:
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._slots = Slots(max_rows)
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._counts = torch.zeros(0, self._vocab_size, dtype=torch.int32, device=self._device)
        self._in_prompt = torch.zeros(0, self._vocab_size, dtype=torch.bool, device=self._device)
        self._weights = torch.zeros(0, 3, dtype=torch.float32, device=self._device)
        """[slots, 3] presence, frequency, repetition."""

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, row: int, admit: Admit) -> None:
        params = admit.params
        weights = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        if weights == (0.0, 0.0, 1.0):
            return
        assert admit.history is not None
        slot = self._slots.take(row)
        self._counts = _grown(self._counts, self._slots.size, self._vocab_size)
        self._in_prompt = _grown(self._in_prompt, self._slots.size, self._vocab_size)
        self._weights = _grown(self._weights, self._slots.size, 3)
        history = torch.tensor(admit.history, dtype=torch.int64, device=self._device)
        prompt, generated = history[: admit.prompt_len], history[admit.prompt_len :]
        ones = torch.ones_like(generated, dtype=torch.int32)
        self._counts[slot] = 0
        self._counts[slot].index_put_((generated,), ones, accumulate=True)
        self._in_prompt[slot] = False
        self._in_prompt[slot, prompt] = True
        self._weights[slot] = torch.tensor(weights)

    def remove(self, row: int) -> None:
        self._slots.release(row)
        if not len(self):
            self._clear()

    def apply(self, logits: Tensor, rows: Rows, positions: Tensor) -> None:
        at, slots = self._slots.find(rows)
        if len(at):
            where = upload(at, logits.device), upload(slots, logits.device)
            self._kernels.apply_penalties(logits, *where, self._counts, self._in_prompt, *self._weights.unbind(1))

    def observe(self, rows: Rows, tokens: Tensor) -> None:
        at, found = self._slots.find(rows)
        if len(at):
            slots, new = upload(found, tokens.device), tokens[upload(at, tokens.device)]
            one = torch.ones((), dtype=torch.int32, device=tokens.device)
            self._counts.index_put_((slots, new), one, accumulate=True)


def _grown(tensor: Tensor, rows: int, width: int) -> Tensor:
    """[R, W] with room for `rows` and `width`: rows double when they grow, columns grow on the left with -1."""
    have, wide = tensor.shape
    if rows <= have and width <= wide:
        return tensor
    rows, width = have if rows <= have else max(rows, 2 * have), max(width, wide)
    grown = torch.full((rows, width), -1, device=tensor.device).to(tensor.dtype)
    grown[:have, width - wide :] = tensor
    return grown


def standard_transforms(
    vocab_size: int,
    max_rows: int,
    eos_token_ids: tuple[int, ...],
    kernels: Kernels,
    device: torch.device,
) -> tuple[LogitsTransform, ...]:
    """All of them, in the order in which they apply."""
    return (
        AllowedTokens(max_rows, device),
        BadWords(max_rows, device),
        MinTokens(vocab_size, max_rows, eos_token_ids, device),
        LogitBias(max_rows, device),
        Penalties(vocab_size, max_rows, kernels, device),
    )
