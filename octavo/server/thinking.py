"""Which tokens of an answer are reasoning: their number is told in the usage, and who wants none of it is told none.

Owns the search for where reasoning begins and ends in the bytes of tokens, one after the other, so that a streamed
answer and a whole one agree. Tags count as reasoning. The text of an answer is read by `text.parsing`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from octavo.text import Tokenizer
from octavo.text.parsing.formats import Formats, chosen, is_harmony

_SPACE = b" \t\r\n"
_LONGEST = 64
"""Bytes that the longest mark of an end may have."""
_ANALYSIS = re.compile(rb"<\|channel\|>\s*analysis\b")
_BODY_END = re.compile(rb"<\|(?:start|channel|end|call|return)\|>")


class Thinking:
    """The tokens of one choice, in order."""

    def __init__(self, formats: Formats, in_reasoning: bool, tokenizer: Tokenizer) -> None:
        tool, reasoning = chosen(formats)
        self._token_bytes = tokenizer.token_bytes
        self._tail = b""
        self._inside = in_reasoning
        self._harmony = is_harmony(tool, reasoning)
        tags = None if reasoning is None else reasoning.tags
        self._over = not self._harmony and tags is None
        """No token that comes is reasoning."""
        self._begin = b"" if tags is None else tags[0].encode()
        self._end = _BODY_END if tags is None else re.compile(re.escape(tags[1].encode()))

    def push(self, token_ids: Sequence[int]) -> list[bool]:
        """For each token whether it is reasoning."""
        if self._over:
            return [False] * len(token_ids)
        return [self._is_reasoning(token) for token in token_ids]

    def _is_reasoning(self, token: int) -> bool:
        if self._over:
            return False
        self._tail += self._token_bytes(token)
        if not self._inside:
            self._inside = self._begins()
            return self._inside
        end = self._end.search(self._tail)
        if end is None:
            self._tail = self._tail[-_LONGEST:]
        else:
            self._inside, self._over = False, not self._harmony
            self._tail = self._tail[end.start() :]
        return True

    def _begins(self) -> bool:
        """Whether reasoning begins with the last token: of harmony anywhere, of tags with the answer alone."""
        if self._harmony:
            found = _ANALYSIS.search(self._tail)
            self._tail = self._tail[found.end() :] if found else self._tail[-_LONGEST:]
            return found is not None
        text = self._tail.lstrip(_SPACE)
        if text.startswith(self._begin):
            self._tail = text[len(self._begin) :]
            return True
        self._over = not self._begin.startswith(text)
        return False
