"""The embedded model's tokenizer against recorded ids, and what Tokenizer promises of any vocabulary."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text import Tokenizer, load_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2-tokens.jsonl.gz"
KNOWN = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d")
"""All but the characters that need one of the bytes without a token in the embedded vocabulary."""


@pytest.mark.parametrize(("parse_special", "count"), [(False, 12_400), (True, 400)])
def test_ids_equal_llama_cpp(smollm: Tokenizer, parse_special: bool, count: int) -> None:
    with gzip.open(FIXTURE, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["special"] == parse_special]
    assert len(rows) == count
    got = smollm.encode_batch([row["text"] for row in rows], parse_special=parse_special)
    assert [row["text"] for row, ids in zip(rows, got, strict=True) if ids != row["ids"]] == []


def test_special_tokens_of_the_embedded_model(smollm: Tokenizer) -> None:
    assert (smollm.vocab_size, smollm.bos_token, smollm.eos_token) == (49_152, "<|im_start|>", "<|im_end|>")
    assert (smollm.bos_token_id, smollm.eos_token_id) == (1, 2)
    assert smollm.special_ids == set(range(17))
    assert 2 in smollm.special_ids
    assert 17 not in smollm.special_ids
    assert smollm.chat_template is not None
    assert "add_generation_prompt" in smollm.chat_template


def test_control_tokens_are_parsed_only_when_asked(smollm: Tokenizer) -> None:
    assert smollm.encode("<|im_end|>") == [2]
    plain = smollm.encode("<|im_end|>", parse_special=False)
    assert 2 not in plain
    assert smollm.decode(plain) == "<|im_end|>"
    assert smollm.decode([2]) == ""
    assert smollm.decode([2], skip_special_tokens=False) == smollm.token_text(2) == "<|im_end|>"


@settings(deadline=None)
@given(text=st.text(KNOWN))
def test_bytes_of_tokens_are_the_text(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text, parse_special=False)
    assert b"".join(map(smollm.token_bytes, ids)) == text.encode()
    assert smollm.decode(ids) == text
    assert len(text.encode()) <= len(ids) * smollm.max_token_bytes


def test_longest_token(smollm: Tokenizer) -> None:
    assert smollm.max_token_bytes == max(len(smollm.token_bytes(i)) for i in range(smollm.vocab_size))


def test_ids_without_a_token_have_no_text(smollm: Tokenizer) -> None:
    assert smollm.token_bytes(smollm.vocab_size) == smollm.token_bytes(-1) == b""
    assert smollm.decode([smollm.vocab_size, -1]) == ""


def test_part_of_a_character_is_shown_as_replacement(smollm: Tokenizer) -> None:
    first = smollm.encode("🙂")[0]
    assert smollm.token_text(first).endswith("�")


def test_half_a_surrogate_pair_is_refused(smollm: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        smollm.encode_batch(["fine", "a\ud83d"])
    assert caught.value.param == "prompt"


def test_encoding_releases_the_interpreter(smollm: Tokenizer) -> None:
    text = "All happy families are alike; every unhappy family is unhappy in its own way. " * 8_000
    thread = threading.Thread(target=smollm.encode, args=(text,))
    start = last = time.perf_counter()
    gap = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
    thread.join()
    assert gap < 0.7 * (last - start)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
