"""How a vocabulary spells bytes: from a piece, as it writes a token, to the bytes of text that the token stands for.

Owns the byte alphabet of GPT-2 and the byte tokens and word marks of SentencePiece. Knows nothing about encoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Spelling = Callable[[str], bytes]
"""From a piece to its bytes."""

WORD_MARK = "▁"
"""What SentencePiece writes for a space (U+2581)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print in Latin-1 are written as they are, the others as U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def byte_level(piece: str) -> bytes:
    """Bytes of a piece in GPT-2's alphabet; a piece with any other character stands for itself."""
    try:
        return bytes(map(BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def byte_token(piece: str) -> bytes | None:
    """The byte of `<0xNN>`, None for any other piece."""
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else None


@dataclass(frozen=True)
class Written:
    """Spells pieces that are plain text but for replacements (a word mark is a space) and, maybe, byte tokens."""

    replacements: tuple[tuple[str, str], ...] = ((WORD_MARK, " "),)
    byte_tokens: bool = True

    def __call__(self, piece: str) -> bytes:
        byte = byte_token(piece) if self.byte_tokens else None
        if byte is not None:
            return byte
        for mark, text in self.replacements:
            piece = piece.replace(mark, text)
        return piece.encode()
