"""A conversation's way from messages to token ids: fitted to the template, rendered, encoded.

Start reading here: messages.py has the form of messages, template.py the templates, sandbox.py their limits, shield.py
what becomes of control tokens in the text of clients.
"""

from __future__ import annotations

from dataclasses import dataclass

TAIL_CHARS = 200


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation: its token ids and the end of its text."""

    ids: list[int]
    tail: str
