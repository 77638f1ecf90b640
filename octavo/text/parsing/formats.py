"""The formats that models speak, in one table, and the choice among them. One parser reads streamed and
whole outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.core.errors import InvalidRequest
from octavo.text.parsing.elements import glm45, qwen3_coder
from octavo.text.parsing.events import Content, Event, OutputParser
from octavo.text.parsing.harmony import HARMONY_MARKERS, harmony
from octavo.text.parsing.marked import deepseek, granite, hermes, json_calls, kimi, llama3_json, mistral
from octavo.text.parsing.pythonic import pythonic
from octavo.text.parsing.reasoning import tagged_reasoning
from octavo.text.parsing.source import Source, Steps, marks
from octavo.text.parsing.tools import Tools


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write calls, or reasoning.

    `markers` are those that may be control tokens. The format is a template's if all strings of one of `signs` occur in
    it. `calls` is the grammar of calls; `openings` is how the first one may begin, up to where it is certain: NAME is a
    tool's, # a number, a space any white space. `tags` begin and end reasoning. Harmony has none of these, being both
    in one. `inside` says whether a prompt without either tag leaves the model in reasoning.
    """

    name: str
    markers: tuple[str, ...]
    signs: tuple[tuple[str, ...], ...] = ()
    calls: Callable[[Source, Tools], Steps[None]] | None = None
    openings: tuple[str, ...] = ()
    tags: tuple[str, str] | None = None
    inside: bool = False
    aliases: tuple[str, ...] = ()


_DEEPSEEK_MARKERS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_KIMI_MARKERS = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
_TOOL_CALL = ("<tool_call>", "</tool_call>")
_JSON_CALL = '{ "name" : "NAME"'
_DEEPSEEK_OPENINGS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜> {",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ```json",
)
_KIMI_OPENINGS = (
    "<|tool_calls_section_begin|> <|tool_call_begin|> functions.NAME:# <|tool_call_argument_begin|>",
    "<|tool_call_begin|> functions.NAME:# <|tool_call_argument_begin|>",
)
_THINK = ("<think>", "</think>")

# in the order of detection: the more specific first
_TOOLS = (
    Format("openai", HARMONY_MARKERS, (("<|channel|>", "<|message|>"),), aliases=("gpt_oss", "harmony")),
    Format("kimi_k2", _KIMI_MARKERS, (("<|tool_call_argument_begin|>",),), kimi, _KIMI_OPENINGS),
    Format(
        "deepseek_v3",
        _DEEPSEEK_MARKERS,
        (("<｜tool▁sep｜>",),),
        deepseek,
        _DEEPSEEK_OPENINGS,
        aliases=("deepseek_r1", "deepseek_v31"),
    ),
    Format(
        "qwen3_coder",
        _TOOL_CALL,
        (("<function=", "<parameter="),),
        qwen3_coder,
        ("<tool_call> <function=NAME>", "<function=NAME>"),
        aliases=("qwen3_xml",),
    ),
    Format(
        "glm45",
        (*_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        (("<arg_key>", "<arg_value>"),),
        glm45,
        ("<tool_call> NAME <arg_key>", "<tool_call> NAME </tool_call>"),
        aliases=("glm47", "glm4_moe"),
    ),
    Format(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        (("[TOOL_CALLS]",),),
        mistral,
        (f"[TOOL_CALLS] [ {_JSON_CALL}", "[TOOL_CALLS] NAME[ARGS]", "[TOOL_CALLS] NAME {"),
    ),
    Format(
        "granite",
        ("<|tool_call|>", *_TOOL_CALL),
        (("<|tool_call|>",),),
        granite,
        (f"<|tool_call|> [ {_JSON_CALL}", f"<tool_call> {_JSON_CALL}"),
        aliases=("granite-20b-fc",),
    ),
    Format(
        "hermes",
        _TOOL_CALL,
        (("<tool_call>",),),
        hermes,
        (f"<tool_call> {_JSON_CALL}",),
        aliases=("qwen", "qwen25", "qwen3", "granite4"),
    ),
    Format(
        "pythonic",
        ("<|python_start|>", "<|python_end|>"),
        (("<|python_start|>",), ("[func_name1(params_name1=params_value1",)),
        pythonic,
        ("<|python_start|> [NAME(", "[NAME("),
        aliases=("llama4_pythonic",),
    ),
    Format(
        "llama3_json",
        ("<|python_tag|>",),
        (("<|python_tag|>",), ("<|start_header_id|>", '"parameters":')),
        llama3_json,
        (f"<|python_tag|> {_JSON_CALL}", _JSON_CALL),
        aliases=("llama4_json", "llama"),
    ),
)
_REASONING = (
    Format(
        "openai_gptoss", HARMONY_MARKERS, (("<|channel|>", "<|message|>"),), aliases=("gpt_oss", "openai", "harmony")
    ),
    Format("mistral", ("[THINK]", "[/THINK]"), (("[THINK]",),), tags=("[THINK]", "[/THINK]")),
    Format(
        "deepseek_r1",
        _THINK,
        (("<｜Assistant｜>", "<think>"), ("<｜Assistant｜>", "</think>")),
        tags=_THINK,
        inside=True,
    ),
    Format(
        "qwen3",
        _THINK,
        (("<think>",), ("</think>",)),
        tags=_THINK,
        aliases=("glm45", "kimi_k2", "deepseek_v3", "deepseek_v31", "think"),
    ),
)


def _named(formats: Sequence[Format]) -> dict[str, Format]:
    return {name: form for form in formats for name in (form.name, *form.aliases)}


TOOL_FORMATS: dict[str, Format] = _named(_TOOLS)
"""Every name of a --tool-call-parser, aliases included."""

REASONING_FORMATS: dict[str, Format] = _named(_REASONING)
"""Every name of a --reasoning-parser, aliases included."""


@dataclass(frozen=True, slots=True)
class Formats:
    """Names out of TOOL_FORMATS and REASONING_FORMATS; None: the output has no such part."""

    tool: str | None = None
    reasoning: str | None = None


def detect(template: str, control_tokens: Iterable[str]) -> Formats:
    """The formats that a chat template speaks of; if it speaks of none, those that have their own control tokens."""
    tokens = frozenset(control_tokens)
    return Formats(_detect(_TOOLS, template, tokens), _detect(_REASONING, template, tokens))


def _detect(formats: Sequence[Format], template: str, tokens: frozenset[str]) -> str | None:
    for form in formats:
        if any(all(sign in template for sign in signs) for signs in form.signs):
            return form.name
    for form in formats:
        if any(all(sign in tokens for sign in signs) for signs in form.signs):
            return form.name
    return None


def chosen(formats: Formats) -> tuple[Format | None, Format | None]:
    """The tool format and the reasoning format. Raises InvalidRequest for a name that no format has."""
    chosen = []
    for name, table, kind in (
        (formats.tool, TOOL_FORMATS, "tool call"),
        (formats.reasoning, REASONING_FORMATS, "reasoning"),
    ):
        if name is not None and name not in table:
            raise InvalidRequest(f"there is no {kind} parser {name!r}; the parsers are {', '.join(sorted(table))}")
        chosen.append(table[name] if name is not None else None)
    return chosen[0], chosen[1]


def is_harmony(tool: Format | None, reasoning: Format | None) -> bool:
    return any(form is not None and form.markers is HARMONY_MARKERS for form in (tool, reasoning))


def markers(formats: Formats) -> frozenset[str]:
    """Texts that the parser must see, whether or not they are control tokens."""
    return frozenset(marker for form in chosen(formats) if form is not None for marker in form.markers)


_TURN = re.compile(r"<\|[^|<>]*\|>|<｜[^｜<>]*｜>|\[/?INST\]")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b[^<]*<\|message\|>(?:(?!<\|).)*\Z", re.DOTALL)


def starts_in_reasoning(formats: Formats, prompt_tail: str) -> bool:
    """True when a prompt with this end leaves the model inside reasoning: opened, not closed, no turn begun since."""
    tool, reasoning = chosen(formats)
    if is_harmony(tool, reasoning):
        return _ANALYSIS.search(prompt_tail) is not None
    if reasoning is None or reasoning.tags is None:
        return False
    opened, closed = _last_tags(reasoning.tags, prompt_tail)
    return reasoning.inside if opened == closed == -1 else opened > closed


def reasoning_is_over(formats: Formats, prompt_tail: str) -> bool:
    """True when a prompt with this end has closed the reasoning of the turn, as those that want none do."""
    _, reasoning = chosen(formats)
    if reasoning is None or reasoning.tags is None:
        return False
    opened, closed = _last_tags(reasoning.tags, prompt_tail)
    return closed > opened


def _last_tags(tags: tuple[str, str], prompt_tail: str) -> tuple[int, int]:
    """Where either tag stands last in the turn that the prompt ends in, -1 for nowhere."""
    turn = max((match.end() for match in _TURN.finditer(prompt_tail)), default=0)
    return prompt_tail.rfind(tags[0], turn), prompt_tail.rfind(tags[1], turn)


class _Parser:
    """Runs a grammar as text arrives."""

    def __init__(self, source: Source, steps: Steps[None]) -> None:
        self._source, self._steps = source, steps
        next(steps)

    def push(self, text: str) -> list[Event]:
        source = self._source
        source.text = text if source.at == len(source.text) else source.text[source.at :] + text
        source.at = 0
        next(self._steps)
        events, source.events = source.events, []
        return events

    def finish(self) -> list[Event]:
        source = self._source
        source.ended = True
        for _ in self._steps:
            raise AssertionError("a grammar waits after the end")
        source.close()
        events, source.events = source.events, []
        return events


def build_parser(
    formats: Formats, tools: Sequence[Mapping[str, Any]], *, in_reasoning: bool, call: Literal["auto", "json"] = "auto"
) -> OutputParser:
    """A parser for one output. Reasoning comes first, then content and calls.

    `tools` as in the request. `call`: "auto", calls as in the tool format; "json", all but reasoning is a JSON list of
    calls, as required and named tool choices are constrained. Raises InvalidRequest for an unknown format.
    """
    tool, reasoning = chosen(formats)
    source, known = Source(), Tools(tools)

    def steps() -> Steps[None]:
        if is_harmony(tool, reasoning):
            yield from harmony(source, known, in_reasoning, call == "json")
        else:
            if reasoning is not None and reasoning.tags is not None:
                yield from tagged_reasoning(source, *reasoning.tags, in_reasoning)
            if call == "json":
                yield from json_calls(source, known)
            elif tool is not None and tool.calls is not None:
                yield from tool.calls(source, known)
        yield from source.upto(marks(), lambda end: source.say(Content, end))

    return _Parser(source, steps())
