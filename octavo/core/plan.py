"""One step of the engine: what every rank must do, told as changes to the rows it already knows.

A running sequence owns a row of device-resident state. A `Plan` names rows and counts, never token lists that the
device can know by itself: a steady decode step of 256 rows is under 1 KB. Pure data; the scheduler writes it, workers
apply it in order.

Rows of a step stand in this order, so that three integers describe the whole batch:

    rows   [ decode ... | drafted ...      | closing ...   | open ...   ]
    count    1            1 + its drafts     its chunk       its chunk
    tokens   row state    row state+drafts   plan.tokens     plan.tokens
    sampled  yes          yes                yes             no
             ^num_decode  ^+num_drafted      ^num_sampled
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from octavo.core.params import SamplingParams
from octavo.core.request import TokenLogprobs

Int32s = NDArray[np.int32]


class Admit(msgspec.Struct, array_like=True):
    """A sequence takes a row. `history` is every token known so far, sent only when sampling depends on it."""

    row: int
    params: SamplingParams
    seed: int
    prompt_len: int
    num_tokens: int
    """Tokens known at admission: the prompt, and after a preemption what was generated before it."""
    num_computed: int
    """Tokens whose KV the prefix cache already holds."""
    history: list[int] | None = None
    bad_word_ids: list[list[int]] = []


class Plan(msgspec.Struct, array_like=True):
    """One step. Applied in this order: retire, admit, rewind, blocks, then the batch itself."""

    step: int
    retire: list[int]
    admit: list[Admit]
    rewind: list[tuple[int, int]]
    """(row, num_computed) of rows whose drafts were rejected in an earlier step."""
    blocks: list[tuple[int, int, int, list[int]]]
    """(row, group, first index in the block table, block ids)."""
    rows: Int32s
    num_decode: int
    num_drafted: int
    num_sampled: int
    counts: Int32s
    """Tokens of each row after the decode rows (those have one)."""
    tokens: Int32s
    """Packed: drafts of the drafted rows, then the chunks of the others."""

    @property
    def num_tokens(self) -> int:
        return self.num_decode + int(self.counts.sum())


class Masks(msgspec.Struct, array_like=True):
    """Which tokens some rows of a step may choose; follows its plan once the tokens before are known."""

    lines: Int32s
    """[M] indices into the plan's sampled rows, rising."""
    bits: Int32s
    """[M, ceil(V / 32)]: bit i % 32 of word i // 32 says that token i is allowed."""


class StepResult(msgspec.Struct):
    """What a step sampled, for rows[:num_sampled] of its plan, in that order.

    Row i produced `tokens[i, :num_tokens[i]]`: one token, or with drafts the accepted ones and one more.
    `logprobs[i]`, where asked for, has one entry for each of them. `prompt_logprobs[i]`, i an index into all of the
    plan's rows, is the position of a prompt token and the entries for it and the ones after it.
    """

    tokens: Int32s
    num_tokens: Int32s
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = {}
    busy_seconds: float = 0.0
    """Device time of the step, and how long the device had waited for it; 0 where the device keeps no time."""
    idle_seconds: float = 0.0


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        small = value.astype(np.uint16) if value.size and value.max() < 2**16 else value.astype(np.int32)
        return (small.itemsize, small.tobytes())
    raise TypeError(f"cannot encode {type(value).__name__} in a plan")


def _decode_array(kind: type, value: Any) -> Any:
    itemsize, data = value
    return np.frombuffer(data, np.uint16 if itemsize == 2 else np.int32).astype(np.int32)


encode_plan = msgspec.msgpack.Encoder(enc_hook=_encode_array).encode
decode_plan = msgspec.msgpack.Decoder(Plan, dec_hook=_decode_array).decode
