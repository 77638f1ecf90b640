"""The incremental decoder against decoding all at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text import Detokenizer, Tokenizer

SAMPLES = ("🙂", "👩‍👩‍👧‍👦", "ภาษาไทย", "नमस्ते", "a", " ", "\n", "é", "漢字", "<|im_end|>", "\ufffd")


def emitted(tokenizer: Tokenizer, chunks: list[list[int]], *, skip: bool = True) -> list[str]:
    decoder = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*map(decoder.push, chunks), decoder.flush()]


@st.composite
def chunked(draw: st.DrawFn, ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    tokens = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    return [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]


@settings(deadline=None)
@given(chunks=chunked(st.lists(st.integers(-1, 49_200), max_size=40)), skip=st.booleans())
def test_any_tokens_in_any_chunks(smollm: Tokenizer, chunks: list[list[int]], skip: bool) -> None:
    every = [token for chunk in chunks for token in chunk]
    assert "".join(emitted(smollm, chunks, skip=skip)) == smollm.decode(every, skip_special_tokens=skip)


@settings(deadline=None)
@given(chunks=chunked(st.lists(st.integers(0, 275), max_size=40)), skip=st.booleans())
def test_any_bytes_in_any_chunks(spm: Tokenizer, chunks: list[list[int]], skip: bool) -> None:
    """Ids 4 to 259 are single bytes, so nearly all of this is malformed UTF-8."""
    every = [token for chunk in chunks for token in chunk]
    assert "".join(emitted(spm, chunks, skip=skip)) == spm.decode(every, skip_special_tokens=skip)


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(SAMPLES), max_size=12))
def test_whole_characters_only(spm: Tokenizer, parts: list[str]) -> None:
    """Fed byte by byte, each character comes with its last byte and none is broken."""
    text = "".join(parts)
    decoder = Detokenizer(spm)
    out = ""
    for char in text:
        *most, last = (byte + 4 for byte in char.encode())
        assert decoder.push(most) == ""
        out += decoder.push([last])
        assert out.endswith(char)
    assert out + decoder.flush() == text


def test_special_tokens_between_halves_of_a_character(smollm: Tokenizer) -> None:
    head, tail = smollm.encode("🙂")[:1], smollm.encode("🙂")[1:]
    assert "".join(emitted(smollm, [[*head, 2, *tail]])) == "🙂"
    shown = "".join(emitted(smollm, [[*head, 2, *tail]], skip=False))
    assert "<|im_end|>" in shown
    assert "🙂" not in shown


def test_unfinished_character_is_flushed_once(smollm: Tokenizer) -> None:
    head = smollm.encode("🙂")[:1]
    assert emitted(smollm, [head]) == ["", "�"]


@pytest.mark.parametrize("skip", [True, False])
def test_nothing_in_nothing_out(smollm: Tokenizer, skip: bool) -> None:
    assert emitted(smollm, [[], []], skip=skip) == ["", "", ""]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_prompts_character_is_not_the_completions(spm: Tokenizer, cut: int) -> None:
    """Ids 4 to 259 are single bytes. What completes the prompt's character is left out, whatever the chunks."""
    data = [byte + 4 for byte in "🙂".encode()]
    prompt, rest = data[:cut], data[cut:]
    hi = [byte + 4 for byte in b"hi"]
    for chunks in ([[*rest, *hi]], [[token] for token in (*rest, *hi)]):
        decoder = Detokenizer(spm, prompt=[*hi, *prompt])
        assert "".join([*map(decoder.push, chunks), decoder.flush()]) == "hi"


def test_a_prompts_character_that_is_never_completed(spm: Tokenizer) -> None:
    prompt = [0xF0 + 4, 0x9F + 4]
    hi = [byte + 4 for byte in b"hi"]
    for ids, text in (([], ""), ([0x99 + 4], ""), (hi, "hi"), ([0x99 + 4, *hi], "hi"), ([0xF0 + 4], "\ufffd")):
        decoder = Detokenizer(spm, prompt=prompt)
        assert decoder.push(ids) + decoder.flush() == text, ids


def test_a_prompt_that_ends_with_a_character(spm: Tokenizer) -> None:
    whole = [byte + 4 for byte in "é🙂".encode()]
    stray = [0x82 + 4]
    for prompt in ([], whole, [*whole[:-1], 2], [1, 2]):
        decoder = Detokenizer(spm, prompt=prompt)
        assert decoder.push(stray) + decoder.push(whole) + decoder.flush() == "\ufffdé🙂"


def test_a_byte_level_prompt_inside_a_character(smollm: Tokenizer) -> None:
    head, tail = smollm.encode("🙂")[:1], smollm.encode("🙂")[1:]
    assert Detokenizer(smollm, prompt=head).push([*tail, *smollm.encode(" ok")]) == " ok"


def test_special_tokens_that_are_shown(smollm: Tokenizer) -> None:
    decoder = Detokenizer(smollm, shown=frozenset({2}))
    assert decoder.push([1, 2]) == "<|im_end|>"
    assert 2 in smollm.special_ids
