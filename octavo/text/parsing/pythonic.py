"""The pythonic formats: a list of Python calls with keyword arguments, [f(a=1), g(b="x")].

Owns the conversion of Python literals (strings, numbers, constants, lists, tuples, dicts) to JSON as they arrive.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from octavo.text.parsing.events import Content
from octavo.text.parsing.json_text import NUMBER
from octavo.text.parsing.marked import attempt
from octavo.text.parsing.source import VALUE_COST, Malformed, Source, Steps, marks
from octavo.text.parsing.tools import Tools, escaped

_NAME = re.compile(r"[\w.]*+")
_IDENTIFIER = re.compile(r"[^\W\d]\w*+(?:\.[^\W\d]\w*+)*+")
_DIGITS = re.compile(r"[-+.\w]*+")
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_CLOSES = {"[": "]", "{": "}", "(": ")"}

# by the string's quote: a run of plain characters and whole escapes; then the quote or the beginning of an escape
_ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|[^xuU\x00-\x1f]|\n)"
_PART = r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U0{0,3}|U000[0-9a-fA-F]{1,4}|U001|U0010[0-9a-fA-F]{0,3})?\Z"
_BODY = {quote: re.compile(rf"[^{quote}\\]*+(?:{_ESCAPE}[^{quote}\\]*+)*+({quote}|{_PART})?") for quote in "'\""}
_SIMPLE = {
    "'": "'",
    '"': '"',
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "\n": "",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "0": "\0",
}
_RAW = {char: escaped(char) for char in (*map(chr, range(32)), '"')}


class _Escapes(dict[str, str]):
    r"""JSON for what follows a backslash; the digits after \x and \u follow as they are."""

    def __missing__(self, char: str) -> str:
        return r"\\" + char


_ESCAPES = _Escapes({char: escaped(meant) for char, meant in _SIMPLE.items()} | {"\\": r"\\", "u": r"\u", "x": r"\u00"})
_SHORT = 9  # characters: no \U with its digits
_WIDE = re.compile(r"\\\\U([0-9a-fA-F]{8})")
_BACKSLASH = (
    "\udfff"  # stands for an escaped backslash while other escapes are replaced; decoded text has no surrogates
)


def pythonic(source: Source, tools: Tools) -> Steps[None]:
    """[name(key=value, ...), ...] at the output's beginning or after <|python_start|>, then maybe <|python_end|>.

    A list is also what users ask for: without the mark it is a call only if it begins with the name of one of the
    tools and "(" with ")" or a keyword after it. What cannot continue a call ends it and is content, as in marked.py.
    """

    def calls(marked: bool) -> Steps[None]:
        yield from source.expect("[")
        separator = ","
        while separator == ",":
            yield from _call(source, tools, marked)
            separator = yield from source.spaces()
            if separator not in (",", "]"):
                raise Malformed
            source.take(source.at + 1)
            source.drop()
        yield from source.closing("<|python_end|>")

    if (yield from source.spaces()) == "[" and not (yield from attempt(source, calls(False))):
        return
    stop = marks("<|python_start|>")
    while (yield from source.upto(stop, lambda end: source.say(Content, end))):
        if not (yield from attempt(source, calls(True))):
            return


def _call(source: Source, tools: Tools, marked: bool) -> Steps[None]:
    source.spend()
    yield from source.spaces()
    name = yield from source.word(_NAME)
    if not _IDENTIFIER.fullmatch(name) or not (marked or tools.known(name)):
        raise Malformed
    yield from source.expect("(")
    key = ""
    if (yield from source.spaces()) != ")":
        key = yield from _keyword(source)
    source.call(name)
    before = "{"
    while key:
        source.arguments(f'{before}"{escaped(key)}": ')
        yield from _value(source)
        before, key = ", ", ""
        if (yield from source.spaces()) == ",":
            source.take(source.at + 1)
            if (yield from source.spaces()) != ")":
                key = yield from _keyword(source)
    yield from source.expect(")")
    source.arguments("{}" if before == "{" else "}")
    source.drop()


def _keyword(source: Source) -> Steps[str]:
    source.spend(VALUE_COST)
    key = yield from source.word(_NAME)
    if not _IDENTIFIER.fullmatch(key) or "." in key:
        raise Malformed
    yield from source.expect("=")
    return key


def _value(source: Source) -> Steps[None]:
    """One literal as JSON. A comma becomes text with the item that follows it, since Python allows one at the end."""
    open_brackets: list[str] = []
    before = ""
    while True:
        char = yield from source.spaces()
        if not (open_brackets and char == _CLOSES[open_brackets[-1]]):
            source.spend(VALUE_COST)
            source.arguments(before)
            if open_brackets and open_brackets[-1] == "{":
                yield from _key(source, char)
                char = yield from source.spaces()
            if char and char in "[({":
                source.take(source.at + 1)
                source.arguments("{" if char == "{" else "[")
                open_brackets.append(char)
                before = ""
                continue
            yield from _scalar(source, char)
        else:
            source.take(source.at + 1)
            source.arguments("}" if open_brackets.pop() == "{" else "]")
        # after an item: close what closes, go on after a comma
        while True:
            if not open_brackets:
                return
            char = yield from source.spaces()
            if char == ",":
                source.take(source.at + 1)
                before = ", "
                break
            if char != _CLOSES[open_brackets[-1]]:
                raise Malformed
            source.take(source.at + 1)
            source.arguments("}" if open_brackets.pop() == "{" else "]")


def _key(source: Source, char: str) -> Steps[None]:
    """A dict's key, which JSON wants to be a string."""
    source.spend(VALUE_COST)
    if char and char in "'\"":
        yield from _string(source, char)
    else:
        source.arguments('"')
        yield from _scalar(source, char)
        source.arguments('"')
    yield from source.expect(":")
    source.arguments(": ")


def _scalar(source: Source, char: str) -> Steps[None]:
    if char and char in "'\"":
        yield from _string(source, char)
        return
    word = yield from source.word(_DIGITS)
    value = word if NUMBER.fullmatch(word) else _CONSTANTS.get(word)
    if value is None:
        raise Malformed
    source.arguments(value)


def _string(source: Source, quote: str) -> Steps[None]:
    source.take(source.at + 1)
    source.arguments('"')
    body = _BODY[quote]
    while True:
        match = body.match(source.text, source.at)
        assert match is not None
        last = match[1]  # the quote or the beginning of an escape
        end = match.end() - len(last) if last else match.end()
        if end > source.at:
            source.pass_on(end, _inside)
        if last == quote:
            source.take(end + 1)
            source.arguments('"')
            return
        if last is None and end < len(source.text):
            raise Malformed
        if source.ended:
            source.pass_on(len(source.text), escaped)
            raise Malformed
        yield


def _inside(text: str) -> str:
    """A run of a string literal as the inside of a JSON string: a pass in C an escape, or if short, a step a character.

    Read as Python does, but for octal and named escapes, which stay as they are.
    """
    if "\\" not in text:
        return escaped(text)
    if len(text) <= _SHORT:
        return _short_inside(text)
    text = text.replace("\\\\", _BACKSLASH)
    for letter, meant in _SIMPLE.items():
        text = text.replace("\\" + letter, meant)
    # the backslashes that are left begin escapes of code points, as in JSON, or stand for themselves
    text = escaped(text).replace(r"\\u", r"\u").replace(r"\\x", r"\u00")
    if r"\\U" in text:
        text = _WIDE.sub(lambda match: json.dumps(chr(int(match[1], 16)))[1:-1], text)
    return text.replace(_BACKSLASH, r"\\")


@lru_cache(maxsize=2**14)
def _short_inside(text: str) -> str:
    """The same few come again and again."""
    chars = iter(text)
    return "".join([_ESCAPES[next(chars)] if char == "\\" else _RAW.get(char, char) for char in chars])
