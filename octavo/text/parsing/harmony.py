"""gpt-oss's harmony: messages of a header and a body, reasoning, content and calls alike.

<|channel|>analysis<|message|>...<|end|>
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
<|start|>assistant<|channel|>final<|message|>...<|return|>

on one line. The recipient may also stand before the channel.
"""

from __future__ import annotations

import re

from octavo.text.parsing.events import Content, Reasoning
from octavo.text.parsing.json_text import call_list, json_value
from octavo.text.parsing.marked import attempt
from octavo.text.parsing.source import Exhausted, Malformed, Source, Steps, marks
from octavo.text.parsing.tools import Tools

HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")

_CHANNEL = re.compile(r"<\|channel\|>\s*+(\w++)")
_RECIPIENT = re.compile(r"\bto=([^\s<]++)")
_HEADER_END = marks("<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>")
_BODY_END = marks("<|start|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")


def harmony(source: Source, tools: Tools, in_reasoning: bool, as_json: bool) -> Steps[None]:
    """Channel analysis is reasoning, a message to functions.NAME (or a tool's name) a call, all else content.

    Text without a header is content; so is a header that no <|message|> follows, markers included. Arguments that are
    not JSON are content from where they break. `as_json`: content is a list of calls.
    """
    if in_reasoning:
        source.skip_space()
        mark = yield from _text(source, Reasoning)
    else:  # the prompt ends with <|start|>assistant, so that a header may go on at once
        char = yield from source.spaces()
        mark = (
            "to="
            if char == "t" and (yield from source.literal("to="))
            else (yield from _content(source, tools, as_json))
        )
    while mark:
        try:
            source.spend()
            mark = yield from _message(source, tools, as_json, mark)
        except Exhausted:
            source.release()
            return
        except Malformed:
            source.release()
            mark = yield from _text(source, Content)


def _message(source: Source, tools: Tools, as_json: bool, mark: str) -> Steps[str]:
    """What begins with `mark`: a header and its body, or text between messages. Returns the mark of what follows."""
    if mark in ("<|end|>", "<|call|>", "<|return|>"):
        source.drop()
        return (yield from _text(source, Content))
    pieces = [mark]
    end = yield from source.upto(_HEADER_END, lambda at: pieces.append(source.take(at)))
    if end != "<|message|>":
        raise Malformed
    source.drop()
    header = "".join(pieces)
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    target = recipient[1] if recipient else ""
    if target.startswith("functions.") or tools.has(target):
        return (yield from _call(source, target.removeprefix("functions.")))
    if channel and channel[1] == "analysis":
        return (yield from _text(source, Reasoning))
    return (yield from _content(source, tools, as_json))


def _call(source: Source, name: str) -> Steps[str]:
    source.call(name)
    if (yield from source.spaces()) == "<":
        source.arguments("{}")
    else:
        yield from json_value(source, source.pass_on)
    source.drop()
    return (yield from _text(source, Content))


def _content(source: Source, tools: Tools, as_json: bool) -> Steps[str]:
    if as_json:
        yield from attempt(source, call_list(source, tools.any_name))
    return (yield from _text(source, Content))


def _text(source: Source, kind: type[Content] | type[Reasoning]) -> Steps[str]:
    """The rest of a body. Returns the mark that ends it, held."""
    mark = yield from source.upto(_BODY_END, lambda end: source.say(kind, end))
    if not mark:
        source.release(kind)
    return mark
