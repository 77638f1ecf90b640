"""JSON that arrives in pieces: one value, the calls of the formats that write them as JSON objects, lists of those.

Owns the search for a value's end. Arguments stay as the model wrote them: a value ends where its brackets balance
outside of strings, or breaks at a character that JSON has nowhere there. Whether what lies between is JSON is for
whoever reads it, as with any server; valid JSON is always found whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate

from octavo.text.parsing.source import Malformed, Sink, Source, Steps

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?[0-9]++)?+")

_DECODER = json.JSONDecoder(strict=False)
_SCALAR = re.compile(r"[-+.\w]*+")
_STRING_RUN = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_PLAIN = b":,+-.0123456789eEtrufalsn \t\r\n"
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_STEPS = [1 if code == ord("[") else -1 for code in range(256)]
_DEPTHS = {**dict.fromkeys(_PLAIN.decode(), 0), **dict.fromkeys("[{", 1), **dict.fromkeys("]}", -1)}
_WALK, _WINDOW, _MOST = 16, 256, 4096
"""Characters that are looked at together, least, at first and at most: to find a value's end must not cost what follows
it."""


class _Extent:
    """Where an object or a list ends. Nesting costs a number."""

    def __init__(self) -> None:
        self.broken = False
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the next character is part of an escape

    def scan(self, text: str, at: int) -> int:
        """How far the value goes in `text` from `at`: to its end (`done`), what it cannot contain (`broken`), or on."""
        size = len(text)
        if size - at <= _WALK:
            return self._walk(text, at, size)
        window, growth = _WINDOW, 2
        while at < size and not (self.done or self.broken):
            end = min(at + window, size)
            if end - at <= _WALK:
                at = self._walk(text, at, end)
            elif self._skip(text[at:end]):
                at = end
                window = min(growth * window, _MOST)
            else:
                window, growth = max(window // 4, _WALK), 1
        return at

    def _walk(self, text: str, at: int, end: int) -> int:
        """As `scan`, character by character."""
        depth, in_string, escaped = self._depth, self._in_string, self._escaped
        for char in text[at:end]:
            if in_string:
                if escaped:
                    escaped = False
                elif char == '"':
                    in_string = False
                elif char == "\\":
                    escaped = True
            elif char == '"':
                in_string = True
            elif char not in _DEPTHS:
                self.broken = True
                break
            elif step := _DEPTHS[char]:
                depth += step
                if not depth:
                    self.done = True
                    at += 1
                    break
            at += 1
        self._depth, self._in_string, self._escaped = depth, in_string, escaped
        return at

    def _skip(self, piece: str) -> bool:
        """Goes over all of `piece`, by in C; False, and no step, if the value may end in it."""
        escaped = False
        if self._escaped:
            piece = "_" + piece[1:]
        if "\\" in piece:
            piece = piece.replace("\\\\", "__").replace('\\"', "__")
            escaped = piece[-1] == "\\"
        parts = piece.split('"')
        outside = "".join(parts[self._in_string :: 2])
        notable = outside.encode("utf-8", "surrogatepass").translate(_BRACKETS, _PLAIN)
        opening, closing = notable.count(b"["), notable.count(b"]")
        if opening + closing < len(notable):
            return False
        if closing >= self._depth and min(accumulate(map(_STEPS.__getitem__, notable)), default=0) <= -self._depth:
            return False
        self._depth += opening - closing
        self._in_string ^= len(parts) % 2 == 0
        self._escaped = escaped
        return True


def is_json(text: str) -> bool:
    """True when `text` is one JSON value, not nested too deeply for json.loads."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_int=len, parse_float=len, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def json_value(source: Source, sink: Sink) -> Steps[None]:
    """Gives one JSON value, after whitespace, to `sink` as it comes. Raises Malformed at what cannot continue it."""
    char = yield from source.spaces()
    if char == '"':
        yield from _string(source, sink)
    elif char and char in "[{":
        yield from _container(source, sink)
    elif char and char in "-0123456789tfn":
        yield from source.run(_SCALAR, sink)
    else:
        raise Malformed


def _container(source: Source, sink: Sink) -> Steps[None]:
    extent = _Extent()
    while True:
        end = extent.scan(source.text, source.at)
        if end > source.at:
            sink(end)
        if extent.done:
            return
        if extent.broken or source.ended:
            raise Malformed
        yield


def _string(source: Source, sink: Sink) -> Steps[None]:
    sink(source.at + 1)
    while True:
        match = _STRING_RUN.match(source.text, source.at)
        end = match.end() if match else source.at
        closed = source.text.startswith('"', end)
        if closed or source.ended:
            end += 1
        if end > source.at:
            sink(min(end, len(source.text)))
        if closed:
            return
        if source.ended:
            raise Malformed
        yield


def json_string(source: Source) -> Steps[str]:
    """A JSON string, decoded."""
    if (yield from source.spaces()) != '"':
        raise Malformed
    pieces: list[str] = []
    yield from _string(source, lambda end: pieces.append(source.take(end)))
    try:
        return str(_DECODER.decode("".join(pieces)))
    except ValueError as error:
        raise Malformed from error


def call_object(source: Source, is_tool: Callable[[str], bool]) -> Steps[None]:
    """A call as {"name": ..., "arguments" or "parameters": {...}}, keys in any order; values of other keys are skipped.

    Malformed without a name for which `is_tool`. A call without arguments has the arguments {}.
    """
    source.spend()
    yield from source.expect("{")
    name: str | None = None
    early: list[str] = []
    has_arguments = False
    separator = "{"
    while separator != "}":
        if separator == "{" and (yield from source.spaces()) == "}":
            source.take(source.at + 1)
            break
        key = yield from json_string(source)
        yield from source.expect(":")
        if key == "name" and name is None:
            name = yield from json_string(source)
            if not is_tool(name):
                raise Malformed
            source.call(name)
            source.arguments("".join(early))
        elif key in ("arguments", "parameters") and not has_arguments:
            has_arguments = True
            sink = source.pass_on if name is not None else lambda end: early.append(source.take(end))
            yield from json_value(source, sink)
        else:
            source.spend()
            yield from json_value(source, source.take)
        separator = yield from source.spaces()
        if separator not in (",", "}"):
            raise Malformed
        source.take(source.at + 1)
    if name is None:
        raise Malformed
    if not has_arguments:
        source.arguments("{}")
    source.drop()


def call_list(source: Source, is_tool: Callable[[str], bool]) -> Steps[None]:
    """A JSON list of such calls, or one call without a list around it."""
    if (yield from source.spaces()) == "{":
        yield from call_object(source, is_tool)
        return
    yield from source.expect("[")
    separator = ","
    while separator == ",":
        yield from call_object(source, is_tool)
        separator = yield from source.spaces()
        if separator not in (",", "]"):
            raise Malformed
        source.take(source.at + 1)
        source.drop()
