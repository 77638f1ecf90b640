"""Tokenizers read from directories in Hugging Face's layout, against the library that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.text import Tokenizer, load_tokenizer


def write(directory: Path, built: tokenizers.Tokenizer | None, **files: Any) -> Path:
    """Saves `built` and each of `files` as NAME.json."""
    if built is not None:
        built.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def byte_level(byte_level_json: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("bytes"), byte_level_json))


@pytest.fixture(scope="module")
def sentencepiece(sentencepiece_json: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("pieces"), sentencepiece_json))


TEXTS = st.lists(st.text() | st.sampled_from(["hello", "<think>", "<|im_end|>", "</s>", " "]), max_size=5).map("".join)


@settings(deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_byte_level_round_trip(
    byte_level: Tokenizer, byte_level_json: tokenizers.Tokenizer, text: str, special: bool
) -> None:
    ids = byte_level.encode(text, parse_special=special)
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    if special:
        assert ids == byte_level_json.encode(text).ids
        assert byte_level.decode(ids) == byte_level_json.decode(ids)
    else:
        assert byte_level.special_ids.isdisjoint(ids)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab é漢🙂")))
def test_sentencepiece_round_trip(
    sentencepiece: Tokenizer, sentencepiece_json: tokenizers.Tokenizer, text: str
) -> None:
    ids = sentencepiece.encode(text)
    assert ids == sentencepiece_json.encode(text).ids
    assert sentencepiece.decode(ids, from_start=True) == sentencepiece_json.decode(ids) == text
    assert sentencepiece.decode(ids) == (" " + text if text else "")


def test_ids_of_added_tokens_hold_without_special_parsing(byte_level: Tokenizer) -> None:
    think = byte_level.encode("<think>", parse_special=False)
    assert think == byte_level.encode("<think>")
    assert byte_level.token_bytes(think[0]) == b"<think>"
    assert think[0] not in byte_level.special_ids


def test_metaspace_decoder(tmp_path: Path) -> None:
    built = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.5), ("▁a", -2.0)], unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    tokenizer = load_tokenizer(write(tmp_path, built))
    ids = tokenizer.encode("a aa")
    assert tokenizer.decode(ids, from_start=True) == built.decode(ids) == "a aa"


def test_names_and_flags_of_special_tokens(byte_level_json: tokenizers.Tokenizer, tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": "<absent>",
        "unk_token": None,
        "added_tokens_decoder": {"262": {"content": "<extra>", "special": True}},
    }
    directory = write(tmp_path, byte_level_json, tokenizer_config=config, special_tokens_map={"mask_token": "<think>"})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<think>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (259, 260, 263)
    assert tokenizer.encode("<extra>") == [262]
    assert len(tokenizer.encode("<extra>", parse_special=False)) > 1
    assert tokenizer.special_ids == {258, 259, 260, 261, 262}  # a token with a role is special whatever the file says


def test_added_token_at_another_id_is_refused(byte_level_json: tokenizers.Tokenizer, tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"900": {"content": "<far>", "special": True}}}
    with pytest.raises(ConfigError, match="'<far>' id 900"):
        load_tokenizer(write(tmp_path, byte_level_json, tokenizer_config=config))


@pytest.mark.parametrize(
    ("config", "frame"),
    [
        ({}, ([259], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True}, ([259], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([259], [260])),
        ({"add_eos_token": None}, ([259], [])),
    ],
)
def test_what_goes_around_a_text(
    byte_level_json: tokenizers.Tokenizer,
    tmp_path: Path,
    config: dict[str, Any],
    frame: tuple[list[int], list[int]],
) -> None:
    built = tokenizers.Tokenizer.from_str(byte_level_json.to_str())
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_tokenizer(write(tmp_path, built, tokenizer_config=names | config))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    for parse_special in (True, False):
        assert tokenizer.encode("hello", parse_special=parse_special) == frame[0] + bare + frame[1]


def test_texts_are_never_cut_or_padded(byte_level_json: tokenizers.Tokenizer, tmp_path: Path) -> None:
    built = tokenizers.Tokenizer.from_str(byte_level_json.to_str())
    built.enable_truncation(2)
    built.enable_padding(length=8)
    tokenizer = load_tokenizer(write(tmp_path, built))
    assert [len(ids) for ids in tokenizer.encode_batch(["abc", "abcdef"])] == [3, 6]


def test_chat_template_by_precedence(byte_level_json: tokenizers.Tokenizer, tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    directory = write(tmp_path, byte_level_json, tokenizer_config={"chat_template": several})
    assert load_tokenizer(directory).chat_template == "plain"
    write(directory, None, chat_template={"chat_template": "from json"})
    assert load_tokenizer(directory).chat_template == "from json"
    (directory / "chat_template.jinja").write_text("from jinja\n", encoding="utf-8")
    assert load_tokenizer(directory).chat_template == "from jinja\n"


def test_named_chat_templates(byte_level_json: tokenizers.Tokenizer, tmp_path: Path) -> None:
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}, {"name": "broken"}]
    directory = write(tmp_path, byte_level_json, tokenizer_config={"chat_template": several})
    assert load_tokenizer(directory).chat_templates == {"default": "plain", "tool_use": "tools"}
    (directory / "chat_template.jinja").write_text("from jinja", encoding="utf-8")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("documents", encoding="utf-8")
    assert load_tokenizer(directory).chat_templates == {"default": "from jinja", "rag": "documents"}


def test_no_chat_template(byte_level: Tokenizer) -> None:
    assert byte_level.chat_template is None


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "None"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]), "Replace in a Sequence"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0)]), "Strip in a Sequence"),
    ],
)
def test_unknown_decoders_are_refused(
    byte_level_json: tokenizers.Tokenizer, tmp_path: Path, decoder: Any, name: str
) -> None:
    built = tokenizers.Tokenizer(byte_level_json.model)
    if decoder is not None:
        built.decoder = decoder
    with pytest.raises(UnsupportedModel, match=f"has the decoder {name}"):
        load_tokenizer(write(tmp_path, built))


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("config.json", ConfigError, "has no tokenizer.json"),
        ("tokenizer.model", UnsupportedModel, "has tokenizer.model"),
    ],
)
def test_directories_without_tokenizer(tmp_path: Path, name: str, error: type[Exception], match: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(error, match=match):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_damaged_files(byte_level_json: tokenizers.Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    directory = write(tmp_path, byte_level_json)
    (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(directory)
