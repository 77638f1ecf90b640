"""Tokens to text as they arrive. The joined output of a Detokenizer is the definition of a completion's text.

Owns the bytes of a character that is not yet complete, nothing else. Stop strings are stop.py's.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from octavo.text.tokenizer import Tokenizer

_TAIL_TOKENS = 16
"""More than enough to find the last three bytes of a prompt, beside tokens without any."""


class Detokenizer:
    """Decodes one sequence in linear time: whole characters only, each as soon as its last byte is here.

    Pushes plus flush, joined, equal `tokenizer.decode` of all ids whatever the chunks. Feed it generated tokens only.
    A character that `prompt` begins and does not complete is the prompt's: what generated tokens add to it is left
    out, whether they complete it or not.

    `shown` are special tokens that stay in the text although the others are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        prompt: Sequence[int] = (),
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        if shown:
            self._skipped -= shown
        self._tail = _incomplete(tokenizer, prompt)
        self._of_prompt = bool(self._tail)
        """The next character is the one that the prompt began."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, maybe none."""
        skipped, token_bytes = self._skipped, self._token_bytes
        data = self._tail + b"".join([token_bytes(i) for i in token_ids if i not in skipped])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return self._own(text) if self._of_prompt else text

    def flush(self) -> str:
        """The end of the sequence: what remains of an incomplete character, as U+FFFD."""
        tail, self._tail = self._tail, b""
        return self._own(tail.decode(errors="replace"))

    def _own(self, text: str) -> str:
        """`text` without the prompt's character."""
        if not self._of_prompt or not text:
            return text
        self._of_prompt = False
        return text[1:]


def _incomplete(tokenizer: Tokenizer, prompt: Sequence[int]) -> bytes:
    """The bytes of the character that the end of `prompt` begins and does not complete."""
    data = b"".join(map(tokenizer.token_bytes, prompt[-_TAIL_TOKENS:]))[-3:]
    _, used = codecs.utf_8_decode(data, "replace", False)
    return data[used:]
