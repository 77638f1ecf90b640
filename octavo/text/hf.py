"""The tokenizer in a model directory of Hugging Face's layout.

Owns the reading of tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.*, and which
decoders of tokenizer.json are understood.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.text.pieces import WORD_MARK, Spelling, Written, byte_level
from octavo.text.tokenizer import Vocabulary

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import AddedToken

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(path: Path) -> Vocabulary:
    """The vocabulary of the directory `path`. Errors: see load_tokenizer."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        raise _missing(path)
    try:
        encoder = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file} cannot be read: {error}") from error
    encoder.no_truncation()
    encoder.no_padding()
    config = _json(path / "tokenizer_config.json")
    named = _named(_json(path / "special_tokens_map.json") | config)
    _complete(encoder, config, named, file)
    _frame(encoder, config, named)
    spell, leading_space = _spelling(encoder, file)
    added = encoder.get_added_tokens_decoder()
    marked = isinstance(spell, Written)  # then added tokens are spelled like all others, word marks included
    return Vocabulary(
        encoder=encoder,
        plain=_without_special(encoder),
        pieces=_pieces(encoder),
        spell=spell,
        special=frozenset(i for i, token in added.items() if token.special),
        added=frozenset() if marked else frozenset(added),
        named={role: token for role, token in named.items() if encoder.token_to_id(token) is not None},
        chat_templates=_chat_templates(path, config),
        leading_space=leading_space,
    )


def _missing(path: Path) -> ConfigError:
    other = next((name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (path / name).is_file()), None)
    if other is None:
        return ConfigError(f"{path} has no tokenizer.json: name a directory that has one with --tokenizer")
    return UnsupportedModel(
        f"{path} has {other} but no tokenizer.json, the only format that is read: save the tokenizer with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) and name that directory with --tokenizer"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no JSON object: download it again")
    return value


def _named(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role; each is written as text or as an object with `content`."""
    found: dict[str, str] = {}
    for role in _ROLES:
        token = config.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[role] = content
    return found


def _complete(encoder: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str], file: Path) -> None:
    """Adds what only tokenizer_config.json knows: further added tokens, and that the named ones are special."""
    from tokenizers import AddedToken

    present = encoder.get_added_tokens_decoder()
    for token_id, token in _declared(config, file):
        if token_id not in present:
            encoder.add_tokens([token])
            if encoder.token_to_id(token.content) != token_id:
                raise ConfigError(
                    f"tokenizer_config.json gives {token.content!r} id {token_id}, {file} "
                    f"{encoder.token_to_id(token.content)}: download both again"
                )
    special = {token.content for token in encoder.get_added_tokens_decoder().values() if token.special}
    for content in sorted(set(named.values()) - special):
        if encoder.token_to_id(content) is not None:
            encoder.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _declared(config: dict[str, Any], file: Path) -> list[tuple[int, AddedToken]]:
    """tokenizer_config.json's added_tokens_decoder, in order of id."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    entries = config.get("added_tokens_decoder") or {}
    try:
        return sorted(
            (
                (int(key), AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags}))
                for key, entry in entries.items()
            ),
            key=lambda item: item[0],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"added_tokens_decoder in tokenizer_config.json beside {file} is malformed: {error!r}"
        ) from error


def _frame(encoder: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """add_bos_token and add_eos_token, where given, replace what tokenizer.json puts around a text."""
    from tokenizers import processors

    if not any(isinstance(config.get(f"add_{role}_token"), bool) for role in ("bos", "eos")):
        return
    frame: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for role, tokens in frame.items():
        token = named.get(f"{role}_token")
        token_id = encoder.token_to_id(token) if token else None
        if config.get(f"add_{role}_token") and token is not None and token_id is not None:
            tokens.append((token, token_id))
    encoder.post_processor = processors.TemplateProcessing(
        single=[*(token for token, _ in frame["bos"]), "$A", *(token for token, _ in frame["eos"])],
        special_tokens=frame["bos"] + frame["eos"],
    )


def _without_special(encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """An encoder over the same model that takes special tokens in the text for text."""
    from tokenizers import Tokenizer

    plain = Tokenizer(encoder.model)
    added: dict[int, AddedToken] = encoder.get_added_tokens_decoder()
    plain.add_tokens([token for _, token in sorted(added.items())])
    assert plain.get_added_tokens_decoder().keys() == added.keys(), "added tokens got other ids"
    plain.encode_special_tokens = True
    if encoder.normalizer is not None:
        plain.normalizer = encoder.normalizer
    if encoder.pre_tokenizer is not None:
        plain.pre_tokenizer = encoder.pre_tokenizer
    if encoder.post_processor is not None:
        plain.post_processor = encoder.post_processor
    return plain


def _pieces(encoder: tokenizers.Tokenizer) -> list[str]:
    vocab = encoder.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocab.values(), default=-1) + 1)
    for piece, token_id in vocab.items():
        pieces[token_id] = piece
    return pieces


def _spelling(encoder: tokenizers.Tokenizer, file: Path) -> tuple[Spelling, bool]:
    """(how pieces become bytes, whether decoding from the start drops one space), from tokenizer.json's decoder."""
    state: dict[str, Any] = {"type": None}
    if encoder.decoder is not None:
        state = json.loads(encoder.decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return byte_level, False
    if state["type"] == "Metaspace":
        mark = ((state["replacement"], " "),)
        return Written(mark, byte_tokens=False), state.get("prepend_scheme", "always") != "never"
    if state["type"] == "Sequence":
        return _sequence(state["decoders"], file)
    raise _unknown(state["type"], file)


def _sequence(steps: list[dict[str, Any]], file: Path) -> tuple[Spelling, bool]:
    """SentencePiece's decoder as converters write it: replacements, byte tokens, then a strip of the whole text."""
    replacements: list[tuple[str, str]] = []
    byte_tokens = fused = leading_space = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"] and not fused:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and not fused:
            byte_tokens = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            leading_space = True
        elif kind == "ByteLevel" and len(steps) == 1:
            return byte_level, False
        elif kind == "Metaspace" and not fused:
            replacements.append((step["replacement"], " "))
            leading_space = step.get("prepend_scheme", "always") != "never"
        else:
            raise _unknown(f"{kind} in a Sequence", file)
    return Written(tuple(replacements), byte_tokens), leading_space


def _unknown(kind: object, file: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{file} has the decoder {kind}; understood are ByteLevel, Metaspace and sequences of Replace ({WORD_MARK!r}), "
        "ByteFallback, Fuse and Strip"
    )


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates by name: of chat_template.jinja and additional_chat_templates/NAME.jinja, else of
    chat_template.json or tokenizer_config.json, which hold one text or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.is_file():
        found = {"default": file.read_text(encoding="utf-8")}
        for more in sorted((path / "additional_chat_templates").glob("*.jinja")):
            found.setdefault(more.stem, more.read_text(encoding="utf-8"))
        return found
    template = _json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, dict):
        named: list[Any] = list(template.items())
    else:
        entries = template if isinstance(template, list) else []
        named = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
