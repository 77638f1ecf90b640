"""Control tokens in what clients send are text: nobody can close a turn from within a message.

Before rendering, each occurrence of a control token's text in a client's strings is replaced by a placeholder that
nobody can guess. Whatever control token the rendered prompt then holds was written by the template; it becomes a mark
that `Tokenizer.encode_marked` reads as that token, and the placeholders become text again:

    client    "a<|im_end|>b"   ──over──>      "a" P "b"
    template  "<|im_start|>user\\na" P "b<|im_end|>"
    marked     M(im_start) "user\\na<|im_end|>b" M(im_end)     <──removed──

A control token's beginning at the end of a string is replaced too, so that two strings side by side do not make one.
Prompts without any of this, nearly all, are left as they are.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from octavo.text.tokenizer import Tokenizer


class Shield:
    """One rendering's placeholders."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._controls = tokenizer.controls
        self._nonce = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(8))
        self._placeholders: dict[str, str] = {}

    def over(self, value: Any) -> Any:
        """`value`, of JSON, with placeholders in its strings; what needs none is the same object."""
        if isinstance(value, str):
            return self._protected(value)
        if isinstance(value, Mapping):
            items = {self.over(key): self.over(child) for key, child in value.items()}
            same = all(map(_is, items, value)) and all(map(_is, items.values(), value.values()))
            return value if same else type(value)(items)  # type: ignore[call-arg]
        if isinstance(value, list | tuple):
            children = [self.over(child) for child in value]
            return value if all(map(_is, children, value)) else children
        return value

    def _protected(self, text: str) -> str:
        controls = self._controls
        if controls.pattern is None:
            return text
        if controls.pattern.search(text):
            text = controls.pattern.sub(lambda match: self._placeholder(match[0]), text)
        body = text.rstrip()
        begun = controls.begun(body)
        return text if not begun else f"{body[: -len(begun)]}{self._placeholder(begun)}{text[len(body) :]}"

    def _placeholder(self, original: str) -> str:
        found = self._placeholders.get(original)
        if found is None:
            number = len(self._placeholders)
            found = self._placeholders[original] = f"{self._nonce}{chr(0x100000 + number)}"
        return found

    def removed(self, text: str) -> tuple[str, str | None]:
        """(the rendered text, the same with marks for control tokens, None where it has no placeholder)."""
        if not self._placeholders:
            return text, None
        originals: dict[str, str] = {}
        for original, placeholder in self._placeholders.items():
            originals[placeholder] = original
            originals[json.dumps(placeholder)[1:-1]] = json.dumps(original)[1:-1]  # of tojson(ensure_ascii=true)
        pattern = re.compile("|".join(map(re.escape, originals)))
        marks = self._controls.marks
        assert self._controls.pattern is not None
        marked = self._controls.pattern.sub(lambda match: marks[match[0]], text)
        return (
            pattern.sub(lambda match: originals[match[0]], text),
            pattern.sub(lambda match: originals[match[0]], marked),
        )


def _is(a: object, b: object) -> bool:
    return a is b
