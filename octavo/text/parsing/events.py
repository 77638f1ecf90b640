"""What a parser reports of a model's text, and the shape of a parser.

Owns the events that the server turns into messages and deltas; which text gives which event is the formats' business.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import msgspec


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text that the model wrote for itself."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A call begins; `index` counts the calls of one output from 0."""

    index: int
    name: str


class Arguments(msgspec.Struct, frozen=True, gc=False):
    """More of the arguments of call `index`: the texts of a finished call, joined, are one JSON text."""

    index: int
    text: str


Event: TypeAlias = Content | Reasoning | ToolCall | Arguments


class OutputParser(Protocol):
    """Reads one output in pieces of any size; the events, once neighbours of a kind are joined, do not depend on it."""

    def push(self, text: str) -> list[Event]:
        """The events that are certain now."""

    def finish(self) -> list[Event]:
        """The output is over: what was held back."""


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring events of one kind (and call) as one: the same for every way to cut an output into pieces."""
    runs: list[list[Event]] = []
    for event in events:
        last = runs[-1][-1] if runs else None
        if type(last) is type(event) and not isinstance(event, ToolCall) and _index(last) == _index(event):
            runs[-1].append(event)
        else:
            runs.append([event])
    return [_join(run) for run in runs]


def _index(event: Event | None) -> int:
    return event.index if isinstance(event, Arguments | ToolCall) else -1


def _join(run: list[Event]) -> Event:
    first = run[0]
    if isinstance(first, ToolCall):
        return first
    return msgspec.structs.replace(
        first, text="".join([event.text for event in run if not isinstance(event, ToolCall)])
    )
