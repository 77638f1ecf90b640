"""Tokenizers rebuilt from GGUF metadata, against a plain statement of the algorithm and hand-made cases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.text import Tokenizer
from octavo.text.gguf_vocab import Kind, from_metadata
from octavo.text.pretokenizers import CUTS, cut_named

Metadata = Callable[..., dict[str, Any]]


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE by its definition: join the neighbours whose union scores best, leftmost first."""
    symbols = list(text)
    while True:
        unions = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not unions:
            return symbols
        at = -max(unions)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab▁", min_size=2, max_size=5), unique=True, max_size=25),
    text=st.text("ab cé", max_size=24),
)
def test_sentencepiece_equals_its_definition(spm_metadata: Metadata, pieces: list[str], text: str) -> None:
    normal = {piece: -float(rank) for rank, piece in enumerate([*pieces, "▁", "a", "b"])}
    tokenizer = Tokenizer(from_metadata(spm_metadata(normal)))
    tokens = spm_metadata(normal)["tokenizer.ggml.tokens"]
    expected: list[int] = []
    for symbol in joined_by_score("▁" + text.replace(" ", "▁"), normal) if text else []:
        names = [symbol] if symbol in normal else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        expected += map(tokens.index, names)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected, from_start=True) == text


def test_sentencepiece_prefix_bos_and_special_tokens(spm: Tokenizer) -> None:
    pieces = {spm.token_text(i): i for i in range(260, spm.vocab_size)}
    assert spm.encode("hi") == [1, pieces[" hi"]]
    assert spm.encode("hi</s>hi", add_special_tokens=False) == [pieces[" hi"], 2, pieces[" hi"]]
    assert spm.encode("<tool>hi", add_special_tokens=False, parse_special=False) == [3, pieces[" hi"]]
    assert 2 not in spm.encode("</s>", add_special_tokens=False, parse_special=False)
    assert spm.encode("") == [1]
    assert spm.special_ids == {0, 1, 2}


def test_sentencepiece_text_keeps_its_space_when_it_continues(spm: Tokenizer) -> None:
    ids = spm.encode("hi", add_special_tokens=False)
    assert spm.decode(ids) == " hi"
    assert spm.decode(ids, from_start=True) == "hi"


def test_sentencepiece_without_prefix_and_bos(spm_metadata: Metadata) -> None:
    changes = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    tokenizer = Tokenizer(from_metadata(spm_metadata({"a": -1.0, "▁": -2.0}, **changes)))
    assert tokenizer.encode("a a") == [260, 261, 260, 2]
    assert tokenizer.decode([261, 260], from_start=True) == " a"


def test_equal_scores_are_refused(spm_metadata: Metadata) -> None:
    with pytest.raises(UnsupportedModel, match="same score"):
        from_metadata(spm_metadata({"a": -5.0, "b": -6.0, "ab": -1.0, "ba": -1.0}))


def test_missing_byte_tokens_are_refused(spm_metadata: Metadata) -> None:
    metadata = spm_metadata({"a": -1.0})
    metadata["tokenizer.ggml.token_type"][4] = int(Kind.UNUSED)
    with pytest.raises(UnsupportedModel, match="255 of the 256 byte tokens"):
        from_metadata(metadata)


def test_byte_level_kinds_of_token(bpe_metadata: Metadata) -> None:
    tokenizer = Tokenizer(from_metadata(bpe_metadata()))
    text = "hello<|user|><tool call>"
    hello = tokenizer.encode("hello")
    assert hello[0] == 257
    assert tokenizer.encode(text) == [*hello, 258, 259]
    plain = tokenizer.encode(text, parse_special=False)
    assert 258 not in plain
    assert plain[-1] == 259
    assert tokenizer.decode([*hello, 258, 259]) == "hello<tool call>"
    assert tokenizer.bos_token == tokenizer.eos_token == "<|user|>"


@pytest.mark.parametrize(
    ("changes", "frame"),
    [
        ({}, (0, 0)),
        ({"add_bos_token": True}, (1, 0)),
        ({"add_eos_token": True}, (0, 1)),
        ({"pre": "llama-bpe"}, (1, 0)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (0, 0)),
    ],
)
def test_what_goes_around_a_text(bpe_metadata: Metadata, changes: dict[str, Any], frame: tuple[int, int]) -> None:
    tokenizer = Tokenizer(from_metadata(bpe_metadata(**changes)))
    for parse_special in (True, False):
        bare = tokenizer.encode("he", add_special_tokens=False, parse_special=parse_special)
        assert bare == [256]
        assert tokenizer.encode("he", parse_special=parse_special) == [258] * frame[0] + bare + [258] * frame[1]


def test_ends_of_turn_are_control_tokens_whatever_their_type(bpe_metadata: Metadata) -> None:
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.tokens"].append("<|im_end|>")
    metadata["tokenizer.ggml.token_type"].append(1)
    tokenizer = Tokenizer(from_metadata(metadata))
    assert 260 in tokenizer.special_ids
    assert tokenizer.encode("<|im_end|>") == [260]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": "t5"}, UnsupportedModel, "'t5'"),
        ({"pre": "made-up"}, UnsupportedModel, "'made-up'.*llama-bpe"),
        ({"pre": None}, UnsupportedModel, "None"),
        ({"merges": ["h e", "hel"]}, ConfigError, "'hel', which is no pair"),
        ({"merges": ["h zz"]}, ConfigError, "do not fit"),
        ({"tokens": None}, ConfigError, "tokens is missing"),
        ({"tokens": ["a", "a"]}, ConfigError, "'a' 2 times"),
        ({"token_type": [1]}, ConfigError, "1 entries for 260"),
        ({"add_bos_token": True, "bos_token_id": 999}, ConfigError, "bos_token_id is 999"),
    ],
)
def test_refused(bpe_metadata: Metadata, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        from_metadata(bpe_metadata(**changes))


TEXT = "I'LL pay 12345 EUR, naïveÉCOLE now!!\n\n  camelCase x"
SPLITS = {
    "gpt-2": "I|'|LL| pay| 12345| EUR|,| naïveÉCOLE| now|!!|\n\n | camelCase| x",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| EUR|,| naïveÉCOLE| now|!!|\n\n | camelCase| x",
    "llama-bpe": "I|'LL| pay| |123|45| EUR|,| naïveÉCOLE| now|!!\n\n| | camelCase| x",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| EUR|,| naïveÉCOLE| now|!!\n\n| | camelCase| x",
    "tekken": "I|'LL| pay| |1|2|3|4|5| EUR|,| naïve|ÉCOLE| now|!!\n\n| | camel|Case| x",
    "gpt-4o": "I'LL| pay| |123|45| EUR|,| naïve|ÉCOLE| now|!!\n\n| | camel|Case| x",
    "deepseek-v3": "I|'LL| pay| |123|45| EUR|,| naïveÉCOLE| now|!!\n\n| | camelCase| x",
    "deepseek-coder": "I|'|LL| pay| |1|2|3|4|5| EUR|,| naïveÉCOLE| now|!!|\n|\n| | camelCase| x",
}


@pytest.mark.parametrize("name", SPLITS)
def test_cuts(name: str) -> None:
    spans = [span for _, span in cut_named(name).build().pre_tokenize_str(TEXT)]
    assert "|".join(TEXT[start:end] for start, end in spans) == SPLITS[name]


def test_marks_stay_with_letters_in_qwen35() -> None:
    """A vowel sign is a mark, not a letter: the older expression cuts there."""
    cuts = {name: len(cut_named(name).build().pre_tokenize_str("हिन्दी")) for name in ("qwen2", "qwen35")}
    assert cuts["qwen35"] == 1
    assert cuts["qwen2"] > 1


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_loses_nothing(name: str) -> None:
    text = TEXT + "漢字ひらがな  \t\r\n१२३ 'ſ ﷽"
    spans = [span for _, span in cut_named(name).build().pre_tokenize_str(text)]
    assert "".join(text[start:end] for start, end in spans) == text


def test_chat_templates_by_name(bpe_metadata: Callable[..., dict[str, Any]]) -> None:
    metadata = bpe_metadata() | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    assert from_metadata(metadata).chat_templates == {"default": "plain", "tool_use": "tools"}
    tokenizer = Tokenizer(from_metadata(bpe_metadata()))
    assert (tokenizer.chat_template, tokenizer.chat_templates) == (None, {})
