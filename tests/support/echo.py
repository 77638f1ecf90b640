"""A worker without a model: it obeys plans exactly and computes the next token from what its pages hold.

Every token of a sequence is written to the slots that the plan's block tables give it, and the next token is a hash of
what a query reads back through those tables. A wrong slot, a stale page, a lost rewind or a block given away too early
changes the tokens, so tests compare them with `naive`.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from octavo.config.kv import KVGroup
from octavo.core.params import SamplingParams
from octavo.core.plan import Admit, Int32s, Plan, StepResult


def next_token(visible: list[list[int]], salt: int, vocab: int) -> int:
    """The token after a position, from what each group's query sees there."""
    data = repr((visible, salt)).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") % vocab


def salt_of(params: SamplingParams, seed: int) -> int:
    return 0 if params.greedy else seed


def naive(prompt: list[int], count: int, windows: list[int | None], salt: int, vocab: int) -> list[int]:
    """`count` tokens after `prompt`, computed without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token([tokens[-w:] if w else tokens for w in windows], salt, vocab))
    return tokens[len(prompt) :]


class EchoWorker:
    """Row state and pages as the real worker keeps them, in Python."""

    def __init__(self, groups: tuple[KVGroup, ...], block_size: int, num_blocks: int, vocab: int) -> None:
        self.windows = [group.window for group in groups]
        self.block_size = block_size
        self.vocab = vocab
        self.pages = np.full((num_blocks, block_size, 2), -1)
        self.rows: dict[int, Admit] = {}
        self.tables: dict[int, list[dict[int, int]]] = {}
        self.computed: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def execute(self, plan: Plan) -> StepResult:
        self._apply(plan)
        work = self._unpack(plan)
        for row, tokens in work:  # all KV writes of a step come before any read
            for i, token in enumerate(tokens):
                self._write(row, self.computed[row] + i, token)
        results = [self._sample(row, tokens) for row, tokens in work[: plan.num_sampled]]
        for row, tokens in work[plan.num_sampled :]:
            self.computed[row] += len(tokens)
        width = max((len(r) for r in results), default=1)
        out: Int32s = np.zeros((len(results), width), np.int32)
        for i, tokens in enumerate(results):
            out[i, : len(tokens)] = tokens
        return StepResult(out, np.array([len(r) for r in results], np.int32))

    def _apply(self, plan: Plan) -> None:
        for row in plan.retire:
            del self.rows[row], self.tables[row], self.computed[row]
            self.last.pop(row, None)
        for admit in plan.admit:
            assert admit.row not in self.rows, "a row is admitted twice"
            self.rows[admit.row] = admit
            self.tables[admit.row] = [{} for _ in self.windows]
            self.computed[admit.row] = admit.num_computed
        for row, computed in plan.rewind:
            self.computed[row] = computed
        for row, group, first, ids in plan.blocks:
            assert 0 not in ids, "the padding page was handed out"
            self.tables[row][group].update(zip(range(first, first + len(ids)), ids, strict=True))

    def _unpack(self, plan: Plan) -> list[tuple[int, list[int]]]:
        rows, packed, counts = plan.rows.tolist(), plan.tokens.tolist(), plan.counts.tolist()
        work = [(row, [self.last[row]]) for row in rows[: plan.num_decode]]
        at = 0
        for i, row in enumerate(rows[plan.num_decode :]):
            first = [self.last[row]] if i < plan.num_drafted else []
            take = counts[i] - len(first)
            work.append((row, first + packed[at : at + take]))
            at += take
        assert at == len(packed), "packed tokens are left over"
        return work

    def _write(self, row: int, position: int, token: int) -> None:
        for table in self.tables[row]:
            block = table[position // self.block_size]
            self.pages[block, position % self.block_size] = (token, position)

    def _read(self, row: int, position: int) -> list[list[int]]:
        """What each group's query at `position` sees."""
        seen = []
        for table, window in zip(self.tables[row], self.windows, strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            tokens = []
            for p in range(first, position + 1):
                token, at = self.pages[table[p // self.block_size], p % self.block_size]
                assert at == p, f"row {row} reads position {at} where it wrote {p}"
                tokens.append(int(token))
            seen.append(tokens)
        return seen

    def _sample(self, row: int, tokens: list[int]) -> list[int]:
        """Samples at the last token, or verifies drafts: the accepted ones and one more."""
        start = self.computed[row]
        drafts = tokens[1:] if row in self.last else []
        first = 0 if drafts else len(tokens) - 1
        salt = salt_of(self.rows[row].params, self.rows[row].seed)
        out: list[int] = []
        for i in range(first, len(tokens)):
            out.append(next_token(self._read(row, start + i), salt, self.vocab))
            if i < len(tokens) - 1 and out[-1] != tokens[i + 1]:
                break
        self.computed[row] = start + first + len(out)
        self.last[row] = out[-1]
        return out
