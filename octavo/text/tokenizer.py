"""Text to token ids and back, for every kind of vocabulary.

Owns encoding, the bytes of each token and the special tokens. Reading the files is hf.py's and gguf_vocab.py's; text
that arrives token by token is detokenizer.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text.controls import Controls
from octavo.text.pieces import Spelling

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """What a reader of tokenizer files finds: two encoders over one model, and how ids become bytes.

    `encoder` finds every added token in the text; `plain` leaves the text of special tokens to the model. Both add
    bos and eos on demand. `pieces` holds the vocabulary's writing of each id, "" where there is none.
    """

    encoder: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer
    pieces: Sequence[str]
    spell: Spelling
    special: frozenset[int]
    """Ids that are not text: control and unknown tokens. Spelled as written."""
    added: frozenset[int] = frozenset()
    """Ids of other tokens that are spelled as written."""
    named: dict[str, str] = field(default_factory=dict)
    """Special tokens by role: bos_token, eos_token, unk_token, pad_token..."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """By name; the usual one is "default"."""
    leading_space: bool = False
    """True when encoding puts a space before the text, as SentencePiece does."""


class Tokenizer:
    """Encodes text and knows the bytes of each token. Safe to share between threads; encoding releases the GIL."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}
        token_to_id = vocabulary.encoder.token_to_id
        self.special_tokens = vocabulary.named
        self.special_ids = vocabulary.special
        """Control and unknown tokens: those that `skip_special_tokens` leaves out."""
        self.chat_templates = vocabulary.chat_templates
        self.chat_template = vocabulary.chat_templates.get("default")
        self.bos_token = vocabulary.named.get("bos_token")
        self.eos_token = vocabulary.named.get("eos_token")
        self.bos_token_id = token_to_id(self.bos_token) if self.bos_token else None
        self.eos_token_id = token_to_id(self.eos_token) if self.eos_token else None
        self.controls = Controls(vocabulary.pieces[i] for i in vocabulary.special)
        self._of_mark = _add_marks(vocabulary, self.controls)

    @property
    def vocab_size(self) -> int:
        """The highest id and one; a model's table of embeddings may be larger."""
        return len(self._vocabulary.pieces)

    @cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token, so that n bytes of text are at least n / max_token_bytes tokens.

        Text that the vocabulary drops (spaces beside tokens that swallow them) is outside this bound.
        """
        upper = [len(piece.encode()) for piece in self._vocabulary.pieces]
        longest = 1
        for token_id in sorted(range(len(upper)), key=upper.__getitem__, reverse=True):
            if upper[token_id] <= longest:
                break
            longest = max(longest, len(self.token_bytes(token_id)))
        return longest

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; see encode_batch."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """Token ids of each text.

        `add_special_tokens` puts bos and eos where the vocabulary wants them. Without `parse_special` the text of a
        control token, `<|im_end|>` say, is text like any other. Raises InvalidRequest for text that is not Unicode.
        """
        vocabulary = self._vocabulary
        encoder = vocabulary.encoder if parse_special else vocabulary.plain
        try:
            encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                check_unicode(text, "prompt")
            raise
        return [encoding.ids for encoding in encodings]

    def encode_marked(self, marked: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text in which `controls.marks` stand for control tokens and their own text is only text."""
        found = self._of_mark.get
        return [found(i, i) for i in self.encode(marked, add_special_tokens=add_special_tokens, parse_special=False)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id without a token, such as padding of the embeddings."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        vocabulary = self._vocabulary
        if not 0 <= token_id < len(vocabulary.pieces):
            return b""
        piece = vocabulary.pieces[token_id]
        if token_id in vocabulary.special or token_id in vocabulary.added:
            return piece.encode()
        return vocabulary.spell(piece)

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs: special tokens as they are written, part of a character as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, from_start: bool = False) -> str:
        """The text of `ids`, equal to what a Detokenizer emits for them; malformed UTF-8 becomes U+FFFD.

        `from_start` says that the ids begin a text rather than continue one: then the space that a SentencePiece
        vocabulary put before it is left out, so that decoding undoes encoding.
        """
        special = self._vocabulary.special if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in special).decode(errors="replace")
        return text.removeprefix(" ") if from_start and self._vocabulary.leading_space else text


def _add_marks(vocabulary: Vocabulary, controls: Controls) -> dict[int, int]:
    """Adds the marks to the plain encoder, treated as their tokens are; from a mark's id to the token's."""
    from tokenizers import AddedToken

    added = {token.content: token for token in vocabulary.encoder.get_added_tokens_decoder().values()}
    known = {text: mark for text, mark in controls.marks.items() if text in added}
    vocabulary.plain.add_tokens(
        [
            AddedToken(
                mark,
                single_word=added[text].single_word,
                lstrip=added[text].lstrip,
                rstrip=added[text].rstrip,
                normalized=added[text].normalized,
                special=False,
            )
            for text, mark in known.items()
        ]
    )
    of_mark: dict[int, int] = {}
    for text, mark in known.items():
        marked, token = vocabulary.plain.token_to_id(mark), vocabulary.encoder.token_to_id(text)
        assert marked is not None
        assert token is not None
        of_mark[marked] = token
    return of_mark


def check_unicode(text: str, name: str) -> int:
    """Size of `text` in bytes of UTF-8. Raises InvalidRequest (param `name`) where it has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has an unpaired surrogate at character {error.start}: send valid Unicode", name
        ) from None


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model: a directory with tokenizer.json, or a .gguf file.

    Raises ConfigError when it is missing or unreadable, UnsupportedModel for a kind that is not implemented.
    """
    from octavo.text import gguf_vocab, hf

    if path.is_dir():
        return Tokenizer(hf.read(path))
    if path.is_file():
        return Tokenizer(gguf_vocab.read(path))
    raise ConfigError(f"no tokenizer at {path}: give a directory with tokenizer.json, or a .gguf file")
