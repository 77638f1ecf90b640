"""The tokenizer in a GGUF file's metadata, rebuilt so that it gives the ids of llama.cpp.

Owns the meaning of `tokenizer.*` keys. Byte-level BPE ("gpt2") is complete. SentencePiece BPE ("llama") joins, at each
step, the neighbours whose union has the best score, leftmost first; that is a BPE with merges ranked by score as long
as no two pieces share one, and a vocabulary in which they do is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.formats.gguf import GGUFFile
from octavo.text.pieces import WORD_MARK, Spelling, Written, byte_level, byte_token
from octavo.text.pretokenizers import cut_named
from octavo.text.tokenizer import Vocabulary

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.models import BPE


class Kind(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}

_ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
}
"""Ends of turn that are control tokens whatever type the file gives them."""


def read(path: Path) -> Vocabulary:
    """The vocabulary of the GGUF file at `path`."""
    return from_metadata(GGUFFile(path).metadata)


def from_metadata(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `tokenizer.*` keys describe.

    Raises UnsupportedModel for an unknown `tokenizer.ggml.model` or `pre`, ConfigError for contradictory tables.
    """
    pieces = _table(metadata, "tokens", str)
    kinds = _kinds(metadata, pieces)
    model_name = metadata.get("tokenizer.ggml.model")
    if model_name == "gpt2":
        return _byte_level_bpe(metadata, pieces, kinds)
    if model_name == "llama":
        return _sentencepiece_bpe(metadata, pieces, kinds)
    raise UnsupportedModel(
        f"tokenizer.ggml.model is {model_name!r}; supported are 'gpt2' and 'llama': use the model's original directory "
        "with tokenizer.json as --tokenizer"
    )


def _table(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
        raise ConfigError(f"tokenizer.ggml.{name} is missing or no array of {kind.__name__}: convert the model anew")
    return value


def _kinds(metadata: Mapping[str, Any], pieces: Sequence[str]) -> list[int]:
    """The kind of each token; NORMAL for all where the file does not say."""
    if len(set(pieces)) != len(pieces):
        piece, times = Counter(pieces).most_common(1)[0]
        raise ConfigError(f"tokenizer.ggml.tokens has {piece!r} {times} times: convert the model anew")
    if "tokenizer.ggml.token_type" in metadata:
        kinds = list(_table(metadata, "token_type", int))
    else:
        kinds = [Kind.NORMAL.value] * len(pieces)
    _same_length("token_type", kinds, pieces)
    for token_id, piece in enumerate(pieces):
        if piece in _ENDS:
            kinds[token_id] = Kind.CONTROL
    return kinds


def _same_length(name: str, table: Sequence[object], pieces: Sequence[str]) -> None:
    if len(table) != len(pieces):
        raise ConfigError(
            f"tokenizer.ggml.{name} has {len(table)} entries for {len(pieces)} tokens: convert the model anew"
        )


def _byte_level_bpe(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> Vocabulary:
    from tokenizers import decoders, models

    cut = cut_named(metadata.get("tokenizer.ggml.pre"))
    merges = _merges(metadata)
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    try:
        model = models.BPE(ids, merges, ignore_merges=cut.whole_words)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    encoders = _encoders(metadata, pieces, kinds, model, add_bos=cut.bos)
    for encoder in encoders:
        encoder.pre_tokenizer = cut.build()
        encoder.decoder = decoders.ByteLevel()
    return _vocabulary(metadata, pieces, kinds, encoders, byte_level, leading_space=False)


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in _table(metadata, "merges", str)]
    if not set(map(len, pairs)) <= {2}:
        wrong = next(pair for pair in pairs if len(pair) != 2)
        raise ConfigError(f"tokenizer.ggml.merges has {' '.join(wrong)!r}, which is no pair: convert the model anew")
    return pairs


def _sentencepiece_bpe(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> Vocabulary:
    from tokenizers import decoders, models, normalizers

    found = {byte_token(piece) for piece, kind in zip(pieces, kinds, strict=True) if kind == Kind.BYTE} - {None}
    if len(found) < 256:
        raise UnsupportedModel(
            f"the vocabulary has {len(found)} of the 256 byte tokens <0x00> to <0xFF>, which SentencePiece needs for "
            "characters without a piece: use the model's original directory with tokenizer.json as --tokenizer"
        )
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    model = models.BPE(ids, _ranked_merges(metadata, pieces, kinds), byte_fallback=True)
    encoders = _encoders(metadata, pieces, kinds, model, add_bos=True)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", WORD_MARK)
    for encoder in encoders:
        encoder.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_MARK), spaces]) if prefix else spaces
        encoder.decoder = decoders.Sequence(
            [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    return _vocabulary(metadata, pieces, kinds, encoders, Written(), leading_space=prefix)


def _ranked_merges(metadata: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """All ways to put a normal piece together from two others, best score first."""
    scores = _table(metadata, "scores", float)
    _same_length("scores", scores, pieces)
    parts = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == Kind.NORMAL}
    ranked: list[tuple[float, str, list[tuple[str, str]]]] = []
    for piece, score in zip(pieces, scores, strict=True):
        if piece not in parts:
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        whole = [pair for pair in splits if pair[0] in parts and pair[1] in parts]
        if whole:
            ranked.append((-score, piece, whole))
    ranked.sort(key=lambda entry: entry[0])
    for (score, piece, _), (next_score, next_piece, _) in pairwise(ranked):
        if score == next_score:
            raise UnsupportedModel(
                f"tokenizer.ggml.scores gives {piece!r} and {next_piece!r} the same score {-score}, so the order of "
                "merges is unknown: use the model's original directory with tokenizer.json as --tokenizer"
            )
    return [pair for _, _, whole in ranked for pair in whole]


def _encoders(
    metadata: Mapping[str, Any], pieces: list[str], kinds: list[int], model: BPE, *, add_bos: bool
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """(finds every special token, finds user-defined ones only), sharing the model."""
    from tokenizers import AddedToken, Tokenizer, processors

    frame = {"bos": _frame_token(metadata, pieces, "bos", add_bos), "eos": _frame_token(metadata, pieces, "eos", False)}
    single = [*(piece for piece, _ in frame["bos"]), "$A", *(piece for piece, _ in frame["eos"])]
    found: list[tokenizers.Tokenizer] = []
    for parsed in ((Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED), (Kind.USER_DEFINED,)):
        encoder = Tokenizer(model)
        encoder.add_tokens(
            [
                AddedToken(piece, normalized=False, special=kind != Kind.USER_DEFINED)
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind in parsed and piece
            ]
        )
        encoder.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=frame["bos"] + frame["eos"]
        )
        found.append(encoder)
    return found[0], found[1]


def _frame_token(metadata: Mapping[str, Any], pieces: list[str], role: str, default: bool) -> list[tuple[str, int]]:
    """The bos or eos token that goes around a text, none where the file wants none."""
    if not metadata.get(f"tokenizer.ggml.add_{role}_token", default):
        return []
    token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if not isinstance(token_id, int) or not 0 <= token_id < len(pieces):
        raise ConfigError(
            f"tokenizer.ggml.add_{role}_token is on, but {role}_token_id is {token_id!r}: convert the model anew"
        )
    return [(pieces[token_id], token_id)]


def _vocabulary(
    metadata: Mapping[str, Any],
    pieces: list[str],
    kinds: list[int],
    encoders: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer],
    spelling: Spelling,
    *,
    leading_space: bool,
) -> Vocabulary:
    named = {}
    for key, role in _ROLES.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(pieces):
            named[f"{role}_token"] = pieces[token_id]
    return Vocabulary(
        encoder=encoders[0],
        plain=encoders[1],
        pieces=pieces,
        spell=spelling,
        special=_of_kind(kinds, Kind.CONTROL, Kind.UNKNOWN),
        added=_of_kind(kinds, Kind.USER_DEFINED),
        named=named,
        chat_templates=_chat_templates(metadata),
        leading_space=leading_space,
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` is the default, `tokenizer.chat_template.NAME` another."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    return {name: text for name, text in ({"default": metadata.get(key)} | found).items() if isinstance(text, str)}


def _of_kind(kinds: list[int], *wanted: int) -> frozenset[int]:
    return frozenset(token_id for token_id, kind in enumerate(kinds) if kind in wanted)
