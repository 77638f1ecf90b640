"""Formats that write each parameter as an element: qwen3_coder and glm45.

Values are plain text, which the tools' schemas turn into JSON: parameters of type string stream, others come when they
are whole. Malformed calls are treated as in marked.py.
"""

from __future__ import annotations

import re

from octavo.text.parsing.marked import marked_calls
from octavo.text.parsing.source import Malformed, Source, Steps, marks
from octavo.text.parsing.tools import TEXT, Tools, escaped, to_json

_NAME = re.compile(r"[^ \t\r\n<>]*+")
_NOT_END = re.compile(r"[^>\n]*+")


class _Object:
    """The arguments of one call, written as a JSON object parameter by parameter."""

    def __init__(self, source: Source, tools: Tools, name: str, ahead: str = "") -> None:
        self._source, self._tools, self._name = source, tools, name
        self._before = "{"
        source.call(name, ahead)

    def value(self, key: str, stop: re.Pattern[str]) -> Steps[None]:
        """The value of parameter `key`, which ends at `stop`. Cut off, it stays as it is."""
        source = self._source
        source.spend()
        types = self._tools.types(self._name, key)
        quote = '"' if types == TEXT else ""
        source.arguments(f'{self._before}"{escaped(key)}": {quote}')
        self._before = ", "
        pieces: list[str] = []
        if quote:
            mark = yield from source.upto(stop, lambda end: source.pass_on(end, escaped))
            source.arguments(quote if mark else "")
        else:
            mark = yield from source.upto(stop, lambda end: pieces.append(source.take(end)))
            text = "".join(pieces)
            source.arguments(to_json(text, types) if mark else text)
        if not mark:
            raise Malformed

    def end(self) -> None:
        self._source.arguments("{}" if self._before == "{" else "}")
        self._source.drop()


def qwen3_coder(source: Source, tools: Tools) -> Steps[None]:
    """<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>, a line each.

    <tool_call> may be missing. One newline at either end of a value is not part of it.
    """
    stop = marks("\n</parameter>", "</parameter>")

    def call(mark: str) -> Steps[None]:
        if mark == "<tool_call>":
            yield from source.expect("<function=")
        name = yield from source.word(_NAME)
        if not name or not (yield from source.literal(">")):
            raise Malformed
        found = _Object(source, tools, name)
        while (yield from source.spaces()) and (yield from source.literal("<parameter=")):
            key = yield from source.word(_NOT_END)
            yield from source.expect(">")
            yield from source.literal("\n")
            yield from found.value(key, stop)
        if not (yield from source.literal("</function>")):
            raise Malformed
        found.end()
        yield from source.closing("</tool_call>")

    yield from marked_calls(source, marks("<tool_call>", "<function="), call)


def glm45(source: Source, tools: Tools) -> Steps[None]:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>, maybe a line each."""
    key_end, value_end = marks("</arg_key>"), marks("</arg_value>")

    def call(_: str) -> Steps[None]:
        yield from source.spaces()
        name = yield from source.word(_NAME)
        yield from source.spaces()
        more = yield from source.literal("<arg_key>")
        last = not more and (yield from source.literal("</tool_call>"))
        if not name or not (more or last):
            raise Malformed
        found = _Object(source, tools, name, "<arg_key>" if more else "")
        while more:
            pieces: list[str] = []
            if not (yield from source.upto(key_end, lambda end, to=pieces: to.append(source.take(end)))):  # type: ignore[misc]
                raise Malformed
            yield from source.expect("<arg_value>")
            yield from found.value("".join(pieces).strip(), value_end)
            yield from source.spaces()
            more = yield from source.literal("<arg_key>")
        if not last and not (yield from source.literal("</tool_call>")):
            raise Malformed
        found.end()

    yield from marked_calls(source, marks("<tool_call>"), call)
