"""Tokens to text as they arrive. The joined output of a Detokenizer is the definition of a completion's text.

Owns the bytes of a character that is not yet complete, nothing else. Stop strings are stop.py's.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from octavo.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one sequence in linear time: whole characters only, each as soon as its last byte is here.

    Pushes plus flush, joined, equal `tokenizer.decode` of all ids whatever the chunks. Feed it generated tokens only.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._tail = b""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, maybe none."""
        skipped, token_bytes = self._skipped, self._token_bytes
        data = self._tail + b"".join([token_bytes(i) for i in token_ids if i not in skipped])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return text

    def flush(self) -> str:
        """The end of the sequence: what remains of an incomplete character, as U+FFFD."""
        tail, self._tail = self._tail, b""
        return tail.decode(errors="replace")
