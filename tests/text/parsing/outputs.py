"""Writers of model outputs, one a format, with the events that they mean; and the ways to cut and read an output."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.text.parsing import Arguments, Content, Event, Formats, Reasoning, ToolCall, build_parser, merged

Call = tuple[str, dict[str, Any]]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "on": {"type": "boolean"},
                    "list": {"type": "array"},
                    "object": {"type": "object"},
                    "nothing": {"type": "null"},
                },
            },
        },
    }
    for name in ("get_weather", "f", "search.web")
]


@dataclass(frozen=True)
class Style:
    """How a format writes calls, and texts that begin like its markers but are none."""

    format: str
    write: Callable[[Sequence[Call], random.Random], str]
    near_misses: tuple[str, ...]
    needs_beginning: bool = False  # no prose before the calls


def parse(
    formats: Formats,
    text: str,
    pieces: Sequence[str] = (),
    *,
    tools: Sequence[Mapping[str, Any]] = TOOLS,
    in_reasoning: bool = False,
    call: Literal["auto", "json"] = "auto",
) -> list[Event]:
    parser = build_parser(formats, tools, in_reasoning=in_reasoning, call=call)
    events: list[Event] = []
    for piece in pieces or (text,):
        events += parser.push(piece)
    return merged([*events, *parser.finish()])


def cut(text: str, rng: random.Random) -> list[str]:
    """Pieces of 1 to 8 characters, or all of one size."""
    size = rng.choice((0, 0, 1, 2, 3, 5))
    pieces, at = [], 0
    while at < len(text):
        end = at + (size or rng.randint(1, 8))
        pieces.append(text[at:end])
        at = end
    return pieces


def meaning(events: Sequence[Event]) -> list[Event]:
    """The events with arguments in one spelling."""
    return [
        Arguments(event.index, json.dumps(json.loads(event.text), ensure_ascii=False))
        if isinstance(event, Arguments)
        else event
        for event in events
    ]


def expected(prose: str, calls: Sequence[Call], after: str = "", reasoning: str = "") -> list[Event]:
    events: list[Event] = [Reasoning(reasoning.strip())] if reasoning.strip() else []
    if prose:
        events.append(Content(prose))
    for index, (name, arguments) in enumerate(calls):
        events += [ToolCall(index, name), Arguments(index, json.dumps(arguments, ensure_ascii=False))]
    return [*events, Content(after)] if after else events


def dump(value: object, rng: random.Random) -> str:
    return json.dumps(
        value,
        ensure_ascii=rng.random() < 0.3,
        indent=rng.choice((None, None, 2)),
        separators=rng.choice((None, (",", ":"))),
    )


def _object(call: Call, rng: random.Random, key: str = "arguments") -> str:
    members = [("name", json.dumps(call[0])), (key, dump(call[1], rng))]
    if rng.random() < 0.3:
        members.reverse()
    if rng.random() < 0.2:
        members.insert(rng.randrange(3), ("type", '"function"'))
    space = rng.choice(("", " ", "\n"))
    return "{" + f",{space}".join(f"{space}{json.dumps(name)}:{space}{value}" for name, value in members) + space + "}"


def _hermes(calls: Sequence[Call], rng: random.Random) -> str:
    space = rng.choice(("", "\n", "\n\n"))
    return space.join(f"<tool_call>{space}{_object(call, rng)}{space}</tool_call>" for call in calls)


def _list(calls: Sequence[Call], rng: random.Random, key: str = "arguments") -> str:
    return "[" + rng.choice((",", ", ", ",\n")).join(_object(call, rng, key) for call in calls) + "]"


def _granite(calls: Sequence[Call], rng: random.Random) -> str:
    begin, end = rng.choice((("<|tool_call|>", ""), ("<tool_call>", ""), ("<tool_call>", "</tool_call>")))
    return begin + rng.choice(("", " ")) + _list(calls, rng) + end


def _llama(calls: Sequence[Call], rng: random.Random) -> str:
    separator = rng.choice((";", "; ", ";\n"))
    return rng.choice(("", "<|python_tag|>")) + separator.join(_object(call, rng, "parameters") for call in calls)


def _mistral(calls: Sequence[Call], rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return "[TOOL_CALLS]" + rng.choice(("", " ")) + _list(calls, rng)
    identity = "[CALL_ID]Zx81aBc9Q" if kind == 1 else ""
    return "".join(f"[TOOL_CALLS]{name}{identity}[ARGS]{dump(arguments, rng)}" for name, arguments in calls)


def _deepseek_v3(calls: Sequence[Call], rng: random.Random) -> str:
    written = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dump(arguments, rng)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return f"<｜tool▁calls▁begin｜>{rng.choice(('', chr(10))).join(written)}<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call], rng: random.Random) -> str:
    written = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dump(arguments, rng)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return f"<｜tool▁calls▁begin｜>{''.join(written)}<｜tool▁calls▁end｜>"


def _kimi(calls: Sequence[Call], rng: random.Random) -> str:
    written = [
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{dump(arguments, rng)}<|tool_call_end|>"  # noqa: E501
        for index, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{rng.choice(('', chr(10))).join(written)}<|tool_calls_section_end|>"


def _qwen_coder(calls: Sequence[Call], rng: random.Random) -> str:
    written = []
    for name, arguments in calls:
        parameters = [f"<parameter={key}>\n{_plain(value, rng)}\n</parameter>\n" for key, value in arguments.items()]
        written.append(f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>")
    return "\n".join(written)


def _glm(calls: Sequence[Call], rng: random.Random) -> str:
    line = rng.choice(("", "\n"))
    written = []
    for name, arguments in calls:
        parameters = [
            f"{line}<arg_key>{key}</arg_key>{line}<arg_value>{_plain(value, rng)}</arg_value>"
            for key, value in arguments.items()
        ]
        written.append(f"<tool_call>{name}{''.join(parameters)}{line}</tool_call>")
    return line.join(written)


def _plain(value: object, rng: random.Random) -> str:
    return value if isinstance(value, str) else dump(value, rng)


def _pythonic(calls: Sequence[Call], rng: random.Random) -> str:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    ]
    return f"[{', '.join(written)}]"


def _llama4(calls: Sequence[Call], rng: random.Random) -> str:
    return f"<|python_start|>{_pythonic(calls, rng)}<|python_end|>"


def _harmony(calls: Sequence[Call], rng: random.Random) -> str:
    written = []
    for name, arguments in calls:
        header = rng.choice(
            (
                f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
                f" to=functions.{name}<|channel|>commentary json<|message|>",
            )
        )
        written.append(f"<|start|>assistant{header}{dump(arguments, rng)}<|call|>")
    return "".join(written)


STYLES = [
    Style("hermes", _hermes, ("<tool_call", "</tool_call>", "<tool_", "<")),
    Style("granite", _granite, ("<|tool_call", "<tool_cal")),
    Style("llama3_json", _llama, ("<|python_tag", "{", "<|"), needs_beginning=True),
    Style("mistral", _mistral, ("[TOOL_CALLS", "[ARGS]", "[")),
    Style("deepseek_v3", _deepseek_v3, ("<｜tool▁calls▁begin", "```json")),
    Style("deepseek_v31", _deepseek_v31, ("<｜tool▁call▁end｜>", "<｜tool▁sep｜>")),
    Style("kimi_k2", _kimi, ("<|tool_calls_section_begi", "<|tool_call_end|>")),
    Style("qwen3_coder", _qwen_coder, ("<function", "<parameter=a>", "<tool_cal")),
    Style("glm45", _glm, ("<tool_cal", "<arg_key>")),
    Style("pythonic", _pythonic, ("[", "f(a=1)", "]"), needs_beginning=True),
    Style("llama4_pythonic", _llama4, ("<|python_start", "f(a=1)")),
]
HARMONY = Style("openai", _harmony, ("<|chan", "<|", "to=functions.f"))

_WORDS = (
    "Sure",
    "the",
    "weather",
    "is",
    "é",
    "日本語",
    "👩‍👩‍👧",
    "ก็",
    "{",
    "}",
    '"',
    "\\",
    "\n",
    "a<b",
    "]",
    "don't",
    "```",
    "1.5",
)
_TEXTS = (*_WORDS, "<tool_call>", "}]", '\\"', "\\n", "\t", "</", "<|", "[TOOL", "\\u00e9", "  ", "\u2028", "'")


def prose(rng: random.Random, near_misses: Sequence[str]) -> str:
    """Words that are no call, without whitespace at either end."""
    return " ".join(rng.choice((*_WORDS, *near_misses)) for _ in range(rng.randint(1, 8))).strip()


def value(rng: random.Random, depth: int = 2) -> Any:
    scalars: list[Callable[[], Any]] = [
        lambda: "".join(rng.choice(_TEXTS) for _ in range(rng.randint(0, 5))),
        lambda: rng.randint(-(10**12), 10**12),
        lambda: rng.choice((0.5, -1.25e-7, 3.0, 1e20)),
        lambda: rng.choice((True, False, None)),
    ]
    if depth and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        return {f"{rng.choice(_TEXTS)}{n}": value(rng, depth - 1) for n in range(rng.randint(0, 3))}
    return rng.choice(scalars)()


def calls(rng: random.Random) -> list[Call]:
    return [(rng.choice(TOOLS)["function"]["name"], _arguments(rng)) for _ in range(rng.randint(1, 3))]


def _arguments(rng: random.Random) -> dict[str, Any]:
    every: dict[str, Any] = {
        "text": "".join(rng.choice(_TEXTS) for _ in range(rng.randint(0, 6))),
        "count": rng.randint(-99, 10**15),
        "ratio": rng.choice((0.25, -3e9, None, 7)),
        "on": rng.random() < 0.5,
        "list": [value(rng) for _ in range(rng.randint(0, 3))],
        "object": {f"k{n}": value(rng) for n in range(rng.randint(0, 3))},
        "nothing": None,
    }
    return {key: every[key] for key in rng.sample(list(every), rng.randint(0, 5))}


def seeds(count: int) -> Iterator[random.Random]:
    return (random.Random(seed) for seed in range(count))
