"""Model text to content, reasoning and tool calls, as it arrives: one incremental parser a format.

Owns the formats in which models write reasoning and tool calls, and which format a model speaks. Knows no tokens (the
detokenizer keeps the `markers` in the text), no HTTP, and does not limit how many calls are used. Start reading at
formats.py, then source.py.
"""

from octavo.text.parsing.events import Arguments, Content, Event, OutputParser, Reasoning, ToolCall, merged
from octavo.text.parsing.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    Format,
    Formats,
    build_parser,
    detect,
    markers,
    starts_in_reasoning,
)
from octavo.text.parsing.lead import lead

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "Arguments",
    "Content",
    "Event",
    "Format",
    "Formats",
    "OutputParser",
    "Reasoning",
    "ToolCall",
    "build_parser",
    "detect",
    "lead",
    "markers",
    "merged",
    "starts_in_reasoning",
]
