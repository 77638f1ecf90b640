"""The control tokens of a vocabulary as they stand in text: how to find them, and marks that stand for them.

Owns no encoding: tokenizer.py adds the marks to its plain encoder.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable


class Controls:
    """Control tokens by their text.

    A mark is private-use characters with a secret of this process, so no client can write one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        given = sorted({text for text in texts if text})
        secret = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(8))
        self.marks = {text: f"{secret}{chr(0x100000 + i)}" for i, text in enumerate(given[:0xFFFD])}
        self.pattern = re.compile(_trie_pattern(given)) if given else None
        """Finds the longest control token at each place, in time linear in the text whatever their number."""
        self._beginnings = frozenset(text[:size] for text in given for size in range(1, len(text)))
        self._longest = max(map(len, given), default=1) - 1

    def begun(self, text: str) -> str:
        """The longest end of `text` that begins a control token without completing it."""
        tail = text[-self._longest :] if self._longest else ""
        return next((tail[at:] for at in range(len(tail)) if tail[at:] in self._beginnings), "")


def _trie_pattern(texts: list[str]) -> str:
    """A regular expression for any of the sorted `texts`, longest first, in which alternatives share no beginning."""
    if not texts:
        return ""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text[1:])
    ends = groups.pop("", None) is not None
    branches = [re.escape(char) + _trie_pattern(rest) for char, rest in groups.items()]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and not ends else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if ends else joined
