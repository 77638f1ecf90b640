"""Streamed equals whole over adversarial token streams: 6,000 cases against a reference that sees all at once."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request, TokenLogprobs
from octavo.frontend.outputs import CompletionOutput
from octavo.frontend.process import OutputProcessor
from octavo.text import Tokenizer
from octavo.text.gguf_vocab import Kind, from_metadata
from octavo.text.pieces import BYTE_OF

CASES = 1500
FRAGMENTS = (
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "ภาษาไทยไม่มี", "नमस्ते", "é", "e\u0301", "\u200d", "\ufffd", "漢", "</think>", "<think>", "\n\n"),
    *("STOP", "ST", "OP", "STO", "aab", "aa", "ab", "b", "a", "<eot>", " ", "."),
)
STOPS = ("STOP", "OP", "aab", "ab", "</think>", "👧", "ไท", "\u200d", "\n\n", "STOPaab", "\ufffd")


@cache
def byte_level() -> Tokenizer:
    """Single bytes, pieces that end or begin inside a character, and a control token."""
    pieces = [*BYTE_OF, "ST", "aa", "</", "<eot>"]
    alphabet = {byte: char for char, byte in BYTE_OF.items()}
    pieces += [
        "".join(alphabet[byte] for byte in data) for data in (b"\xf0\x9f", b"\x91\xa9", b"\x98\x80a", b"\xe0\xb8")
    ]
    return Tokenizer(
        from_metadata(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "gpt-2",
                "tokenizer.ggml.tokens": pieces,
                "tokenizer.ggml.token_type": [
                    int(Kind.CONTROL if piece == "<eot>" else Kind.NORMAL) for piece in pieces
                ],
                "tokenizer.ggml.merges": ["S T", "a a", "< /"],
            }
        )
    )


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece: characters without a piece are byte tokens."""
    normal = ["▁", "a", "b", "S", "T", "O", "P", "é", "ส", "aa", "ST", "▁a"]
    pieces = ["<unk>", "<s>", "<eot>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256, *[Kind.NORMAL] * len(normal)]
    return Tokenizer(
        from_metadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": pieces,
                "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(normal))],
                "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
                "tokenizer.ggml.bos_token_id": 1,
            }
        )
    )


def tokens(rng: random.Random, tokenizer: Tokenizer, most: int) -> list[int]:
    """Text cut anywhere between tokens, broken characters, and control tokens in the midst of it."""
    ids: list[int] = []
    for _ in range(rng.randint(0, most)):
        some = tokenizer.encode(rng.choice(FRAGMENTS), add_special_tokens=False)
        if rng.random() < 0.3:
            del some[rng.randrange(len(some)) :]
        if rng.random() < 0.1:
            some.insert(rng.randint(0, len(some)), rng.randrange(tokenizer.vocab_size))
        ids += some
    return ids


def reference(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], params: SamplingParams, shown: frozenset[int], ended: bool
) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string, from the decoded text of each beginning of `ids`."""
    skipped = (tokenizer.special_ids if params.skip_special_tokens else frozenset()) - shown
    head = b"".join(map(tokenizer.token_bytes, prompt))
    begun = next((head[-n:] for n in (3, 2, 1) if begins_a_character(head[-n:])), b"")
    spoken = ids[:-1] if ended and not params.include_stop_str_in_output else ids

    def text(count: int, final: bool) -> str:
        data = begun + b"".join(tokenizer.token_bytes(i) for i in spoken[:count] if i not in skipped)
        if not final and (cut := next((n for n in (1, 2, 3) if begins_a_character(data[-n:])), 0)):
            data = data[:-cut]
        return data.decode(errors="replace")[bool(begun) :]

    least = min(params.min_tokens, len(spoken))
    free = text(least, False)
    for count in range(least + 1, len(spoken) + 2):
        final = count > len(spoken)
        rest = text(count, final)[len(free) :]
        ends = sorted((at + len(stop), -len(stop), stop) for stop in params.stops if (at := rest.find(stop)) >= 0)
        if ends:
            end, _, stop = ends[0]
            cut = end if params.include_stop_str_in_output else end - len(stop)
            return free + rest[:cut], len(ids) if final else count, stop
    return text(len(spoken), True), len(ids), None


def begins_a_character(data: bytes) -> bool:
    """True for the bytes of one character that lack the last of them."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def generate(
    rng: random.Random,
    tokenizer: Tokenizer,
    request: Request,
    ids: list[int],
    reason: Any,
    shown: frozenset[int],
    stream: bool,
) -> CompletionOutput:
    """The tokens in random steps, taken now and then; the outputs joined."""
    outputs = OutputProcessor(tokenizer)
    state = outputs.add(request, stream=stream, shown=shown)
    taken: list[CompletionOutput] = []
    at = 0
    while not state.finished:
        step = rng.choice((1, 1, 1, 2, 3, 8)) if stream else len(ids)
        some, at = ids[at : at + step], at + step
        delta = Delta(request.id, 0, some, reason if at >= len(ids) else None)
        delta.logprobs = [TokenLogprobs([token], [-0.5 * token], 1) for token in some]
        outputs.process([delta], 0.0)
        if stream and (rng.random() < 0.7 or state.finished):
            taken += state.take().outputs
    if not stream:
        taken = state.take().outputs
    last = taken[-1]
    return CompletionOutput(
        0,
        "".join(output.text for output in taken),
        [token for output in taken for token in output.token_ids],
        last.cumulative_logprob,
        [entry for output in taken for entry in output.logprobs or ()],
        last.finish_reason,
        last.stop_reason,
    )


@pytest.mark.parametrize("vocabulary", [byte_level, byte_fallback])
@pytest.mark.parametrize("stops", [False, True])
def test_streamed_equals_whole(vocabulary: Any, stops: bool) -> None:
    tokenizer = vocabulary()
    (eot,) = tokenizer.encode("<eot>", add_special_tokens=False)
    rng = random.Random(f"{vocabulary.__name__} {stops}")
    found = 0
    for case in range(CASES):
        params = SamplingParams(
            stop=rng.sample(STOPS, rng.randint(1, 4)) if stops else None,
            include_stop_str_in_output=rng.random() < 0.3,
            min_tokens=rng.choice((0, 0, 0, 3)),
            skip_special_tokens=rng.random() < 0.7,
            logprobs=0,
            max_tokens=1000,
        )
        shown = frozenset({eot}) if rng.random() < 0.3 else frozenset()
        prompt = [rng.randrange(tokenizer.vocab_size), *tokens(rng, tokenizer, 2)]
        request = Request("r", prompt, params, 0.0)
        ended = rng.random() < 0.5
        ids = [*tokens(rng, tokenizer, 8), eot if ended else 65]
        reason = "stop" if ended else "length"
        expected, count, stop = reference(tokenizer, prompt, ids, params, shown, ended)
        whole = generate(rng, tokenizer, request, ids, reason, shown, False)
        assert (whole.text, len(whole.token_ids), whole.stop_reason) == (expected, count, stop), case
        streamed = generate(rng, tokenizer, request, ids, reason, shown, True)
        assert streamed == whole, case
        found += stop is not None
    assert (found > CASES // 10) == stops
