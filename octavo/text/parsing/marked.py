"""Formats that mark calls and write arguments as JSON: hermes, llama3_json, granite, mistral, deepseek, kimi.

In all of them: text that begins like a call and breaks before the name is certain is content, markers included; a call
that breaks later, or that the output's end cuts off, ends there, and what is not yet certain is content with all that
follows. Arguments that have begun stay arguments. Whitespace around calls is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from octavo.text.parsing.events import Content
from octavo.text.parsing.json_text import call_list, call_object, json_value
from octavo.text.parsing.source import MARK_COST, Exhausted, Malformed, Source, Steps, marks
from octavo.text.parsing.tools import Tools

_NAME = re.compile(r"[\w.\-/]*+")
_KIMI_NAME = re.compile(r"[\w.\-/:]*+")
_NOT_SPACE = re.compile(r"[^ \t\r\n<`]*+")


def attempt(source: Source, call: Steps[None]) -> Steps[bool]:
    """Runs one call's steps; what is malformed becomes content. False once no more calls may be read."""
    try:
        source.spend(MARK_COST)
        yield from call
    except Exhausted:
        source.release()
        return False
    except Malformed:
        source.release()
    return True


def marked_calls(source: Source, stop: re.Pattern[str], call: Callable[[str], Steps[None]]) -> Steps[None]:
    """Content, in which each of the marks begins a `call`."""
    while mark := (yield from source.upto(stop, lambda end: source.say(Content, end))):
        if not (yield from attempt(source, call(mark))):
            return


def hermes(source: Source, tools: Tools) -> Steps[None]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>"""

    def call(_: str) -> Steps[None]:
        yield from call_object(source, tools.any_name)
        yield from source.closing("</tool_call>")

    yield from marked_calls(source, marks("<tool_call>"), call)


def granite(source: Source, tools: Tools) -> Steps[None]:
    """<|tool_call|> or <tool_call>, then a list of calls or one call, then maybe </tool_call>."""

    def call(_: str) -> Steps[None]:
        yield from call_list(source, tools.any_name)
        yield from source.closing("</tool_call>")

    yield from marked_calls(source, marks("<|tool_call|>", "<tool_call>"), call)


def llama3_json(source: Source, tools: Tools) -> Steps[None]:
    """{"name": ..., "parameters": {...}}, several separated by ";", at the output's beginning or after <|python_tag|>.

    JSON is also what users ask for: without the tag it is a call only if it names one of the tools.
    """

    def calls(is_tool: Callable[[str], bool]) -> Steps[None]:
        yield from call_object(source, is_tool)
        while (yield from source.spaces()) == ";":
            source.take(source.at + 1)
            if (yield from source.spaces()) != "{":
                return
            yield from call_object(source, is_tool)

    if (yield from source.spaces()) == "{" and not (yield from attempt(source, calls(tools.known))):
        return
    yield from marked_calls(source, marks("<|python_tag|>"), lambda _: calls(tools.any_name))


def mistral(source: Source, tools: Tools) -> Steps[None]:
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name[ARGS]{...}, name[CALL_ID]id[ARGS]."""

    def call(_: str) -> Steps[None]:
        if (yield from source.spaces()) in ("[", "{"):
            yield from call_list(source, tools.any_name)
            return
        name = yield from source.word(_NAME)
        if not name:
            raise Malformed
        if (yield from source.literal("[CALL_ID]")):
            yield from source.word(_NAME)
        if not (yield from source.literal("[ARGS]")) and (yield from source.spaces()) != "{":
            raise Malformed
        source.call(name)
        yield from json_value(source, source.pass_on)
        source.drop()

    yield from marked_calls(source, marks("[TOOL_CALLS]"), call)


def deepseek(source: Source, tools: Tools) -> Steps[None]:
    """<｜tool▁call▁begin｜>function<｜tool▁sep｜>name, the arguments in a ```json fence, <｜tool▁call▁end｜>
    (V3, R1), or <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜> (V3.1), all in a section of calls."""

    def arguments() -> Steps[None]:
        yield from source.spaces()
        name = yield from source.word(_NOT_SPACE)
        yield from source.expect("<｜tool▁sep｜>")
        fenced = (yield from source.spaces()) != "{"
        if fenced:
            name = yield from source.word(_NOT_SPACE)
            yield from source.expect("```json")
        if not name:
            raise Malformed
        source.call(name)
        yield from json_value(source, source.pass_on)
        source.drop()
        if fenced:
            yield from source.closing("```")

    yield from _sectioned(
        source,
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        arguments,
    )


def kimi(source: Source, tools: Tools) -> Steps[None]:
    """<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|> in a section of calls."""

    def arguments() -> Steps[None]:
        yield from source.spaces()
        identity = yield from source.word(_KIMI_NAME)
        name = re.sub(r":[0-9]*\Z", "", identity).removeprefix("functions.")
        yield from source.expect("<|tool_call_argument_begin|>")
        if not name:
            raise Malformed
        source.call(name)
        yield from json_value(source, source.pass_on)
        source.drop()

    yield from _sectioned(
        source,
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
        arguments,
    )


def _sectioned(source: Source, words: tuple[str, str, str, str], arguments: Callable[[], Steps[None]]) -> Steps[None]:
    """Calls with a begin and an end each, in a section that has them too; a call without a section is read as well."""
    section_begin, begin, end, section_end = words

    def section(mark: str) -> Steps[None]:
        if mark == section_begin:
            yield from source.expect(begin)
        more = True
        while more:
            source.spend()
            yield from arguments()
            yield from source.closing(end)
            yield from source.spaces()
            more = yield from source.literal(begin)
        yield from source.closing(section_end)

    yield from marked_calls(source, marks(section_begin, begin), section)


def json_calls(source: Source, tools: Tools) -> Steps[None]:
    """What required and named tool choices are constrained to: a list of {"name": ..., "parameters": {...}}."""
    yield from attempt(source, call_list(source, tools.any_name))
