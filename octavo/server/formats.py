"""In which formats a model writes tool calls and reasoning, and the parsers that read them.

Owns the choice: the operator's flags, else what the chat template shows. The formats themselves are `text.parsing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from octavo.core.errors import ConfigError
from octavo.text.parsing import REASONING_FORMATS, TOOL_FORMATS, Formats, detect, lead, markers

if TYPE_CHECKING:
    from octavo.text import Tokenizer

DEFAULT_TOOL_FORMAT = "hermes"
"""Of models whose template shows none."""


def check_parser_names(tool: str, reasoning: str) -> None:
    """Raises ConfigError for a name that is neither auto, none nor a format's."""
    for flag, name, known in (
        ("--tool-call-parser", tool, TOOL_FORMATS),
        ("--reasoning-parser", reasoning, REASONING_FORMATS),
    ):
        if name not in ("auto", "none", *known):
            raise ConfigError(f"{flag} is {name!r}: choose auto, none or one of {', '.join(sorted(known))}")


class ModelFormats:
    """The formats of one model's answers."""

    def __init__(self, tool: str, reasoning: str, tokenizer: Tokenizer | None) -> None:
        """`tool` and `reasoning` are names of formats, auto or none."""
        self._tool = tool
        self._reasoning = reasoning
        self._control = {} if tokenizer is None else {tokenizer.token_text(i): i for i in tokenizer.special_ids}
        self._detect = lru_cache(maxsize=16)(detect)

    def of(self, template: str, *, tools: bool) -> Formats:
        """The formats of an answer to a prompt of the chat template `template`; tool calls are read with `tools`."""
        found = self._detect(template, frozenset(self._control))
        tool = (found.tool or DEFAULT_TOOL_FORMAT) if self._tool == "auto" else self._tool
        reasoning = found.reasoning if self._reasoning == "auto" else self._reasoning
        return Formats(tool if tools and tool != "none" else None, None if reasoning == "none" else reasoning)

    def shown(self, formats: Formats) -> frozenset[int]:
        """The control tokens that a parser of `formats` must see in the text."""
        return frozenset(self._control[text] for text in markers(formats) if text in self._control)

    def lead(self, formats: Formats, prompt_tail: str, calls: Sequence[str]) -> str:
        """What a constraint leaves free of an answer, where the tools `calls` may be called: `text.parsing.lead`."""
        return lead(formats, prompt_tail, self._control, calls)
