"""Times the output parsers on text that is made to be slow to parse: python -m tools.parser_speed [FORMAT ...].

FORMAT is one that tool calls are written in, "json" (required calls), or "think:" and one that reasoning is written in.

Every format reads every text once as it is and once in pieces of 4 characters, the latter in part. The texts that take
longest, and those that take longer than in proportion, are then measured: the median of 3 parses (process time) of 1 MB
and of 2 MB, in one piece and in pieces. Limits for 1 MB: 100 ms in one piece, 1 s in pieces; 2 MB may take 2.3 times as
long. Prints each format's worst figures and exits with 1 if any is over a limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from octavo.text.parsing import REASONING_FORMATS, Formats, OutputParser, build_parser

SIZE = 1_000_000
PIECE = 4
WHOLE_LIMIT, CUT_LIMIT, GROWTH_LIMIT = 0.100, 1.0, 2.3
CUT_PART = 16  # the first look at pieces reads this part of the text
FINALISTS = 3  # texts of each kind that are measured
LEAST = 0.005  # a parse this quick is not measured well enough for a ratio: seconds

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}},
        },
    }
]

# how a format's output comes to where arguments are read
OPENINGS = {
    "openai": ["<|channel|>commentary to=functions.f<|message|>", "<|channel|>analysis<|message|>", "<|channel|>"],
    "kimi_k2": ["<|tool_call_begin|>f:0<|tool_call_argument_begin|>"],
    "deepseek_v3": ["<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>f```json"],
    "qwen3_coder": ["<function=f><parameter=a>", "<function=f><parameter=b>", "<function=f>", "<function="],
    "glm45": [
        "<tool_call>f<arg_key>a</arg_key><arg_value>",
        "<tool_call>f<arg_key>b</arg_key><arg_value>",
        "<tool_call>f<arg_key>",
    ],
    "mistral": ["[TOOL_CALLS]f[ARGS]", '[TOOL_CALLS][{"name":"f","arguments":', "[TOOL_CALLS]"],
    "granite": ['<|tool_call|>[{"name":"f","arguments":'],
    "hermes": ['<tool_call>{"name":"f","arguments":', '<tool_call>{"arguments":', '<tool_call>{"', "<tool_call>"],
    "pythonic": ["[f(a=", "[f(a='", "[f(a=[", "[f(", "["],
    "llama3_json": ['{"name":"f","parameters":', '{"parameters":'],
    "json": ['[{"name":"f","parameters":', "["],
    "think:openai_gptoss": ["<|channel|>analysis<|message|>", "<|channel|>final<|message|>"],
    "think:mistral": ["[THINK]", "[THINK]a[/THINK]"],
    "think:deepseek_r1": ["<think>", "a</think>"],
    "think:qwen3": ["<think>", "<think>a</think>"],
}

PATTERNS = [
    "<", "{", "[", "(", '"', "'", "\\", " ", "\n", "a", "1", "é😀", ",", "}", "]", "<|", "</", "[T", "`", "-", "=",
    ";", '"\\', '"\\"', "\\n", "\\\\", "\\u00e9", "\\x41", "\\\\n", "\\ud83d\\ude00", '"\\u00e9",', "\\'", "\t\r\n ",
    "[]", "{}", "[],", "{},", "[[],", "[1,", '{"a":', '{"a":[', '[{"":', '{"a":{"a":1},"b":', "1,", '"",', "'',",
    "'a',\"a\",", "[1],", "[[1]],", "[[[1]]],", "[[[[1]]]],", "[[[[1]]],", "[[1],", "1],", "true,", "null]", "[[{}],",
    '{"a":1},', "a=1,", "f(),", '{"name":', '{"name":"f"},', '{"name":"f","arguments":{}},', "[f(a=1)]", "f(a=1),",
    '{"parameters":{}', '"name":"f",', '{"name":"f","parameters":{}};', '"x":1,', "<think>", "</think>", "[f(a=[",
    "{1:", "True,", "1.5e3,", '{"":"",',
]  # fmt: skip

ROUTES = {
    "hermes": [
        "<tool_call>",
        "<tool_call>{",
        '<tool_call>{"name":"f"}</tool_call>',
        '<tool_call>{"name":"f","arguments":{',
    ],
    "qwen3_coder": [
        "<function=f>",
        "<parameter=a></parameter>",
        "<parameter=b>1</parameter>",
        "\n</parameter",
        "\n",
        "<function=f></function>",
    ],
    "glm45": [
        "<arg_key>a</arg_key><arg_value>",
        "<arg_key>",
        "<tool_call>f",
        "<tool_call>f</tool_call>",
        "</arg_value",
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS]f[ARGS]{}", "[TOOL_CALLS]f", "[TOOL_CALLS][", "[TOOL_CALLS"],
    "granite": ["<|tool_call|>", "<|tool_call|>[{", '<|tool_call|>{"name":"f"}'],
    "kimi_k2": [
        "<|tool_call_begin|>",
        "<|tool_call_begin|>f<|tool_call_argument_begin|>{}",
        "<|tool_calls_section_begin|>",
        "<|tool_call",
    ],
    "deepseek_v3": [
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call",
    ],
    "openai": [
        "<|channel|>",
        "<|start|>",
        "<|message|>",
        "<|end|>",
        "<|channel|>final<|message|>a<|end|>",
        "<|channel|>x to=functions.f<|message|>{}<|call|>",
    ],
    "pythonic": ["<|python_start|>", "<|python_start|>[f(a=1)]", "<|python_start|>[", "a='',", "a=1,"],
    "llama3_json": ["<|python_tag|>", '<|python_tag|>{"name":"f"}', "<|python_tag|>{", ";"],
    "json": [],
    "think:openai_gptoss": ["<|channel|>analysis<|message|>a<|end|>", "<|channel|>", "<|message|>", "<|end|>", "<|end"],
    "think:mistral": ["[THINK]", "[/THINK]", "[/THINK", "[/THINK]\n"],
    "think:deepseek_r1": ["</think", "</think>\n", "\n</think"],
    "think:qwen3": ["</think", "</think>\n", "\n</think"],
}


def texts(name: str) -> Iterator[tuple[str, str]]:
    """(opening, pattern): the text is the opening and then the pattern over and over."""
    patterns = [*PATTERNS, *ROUTES[name]]
    yield from (("", pattern) for pattern in patterns)
    yield from ((opening, pattern) for opening in OPENINGS[name] for pattern in patterns)


def repeated(opening: str, pattern: str, size: int) -> str:
    return (opening + pattern * (size // len(pattern) + 1))[:size]


def parser(name: str) -> OutputParser:
    """A parser of the tool format, or of the reasoning format "think:NAME"."""
    if name == "json":
        return build_parser(Formats(), TOOLS, in_reasoning=False, call="json")
    _, think, reasoning = name.rpartition("think:")
    if think:
        return build_parser(Formats(reasoning=reasoning), [], in_reasoning=REASONING_FORMATS[reasoning].inside)
    return build_parser(Formats(tool=name), TOOLS, in_reasoning=False)


def seconds(name: str, text: str, piece: int) -> float:
    """Process time of one parse, without that of cutting the text."""
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    reader = parser(name)
    begin = time.process_time()
    for part in pieces:
        reader.push(part)
    reader.finish()
    return time.process_time() - begin


@dataclass(frozen=True, slots=True, order=True)
class Figure:
    """Median seconds for 1 MB of a text, and how many times as long 2 MB takes."""

    once: float
    growth: float
    text: tuple[str, str]


def measure(name: str, text: tuple[str, str], piece: int) -> Figure:
    once, twice = (
        statistics.median(seconds(name, repeated(*text, size), piece or size) for _ in range(3))
        for size in (SIZE, 2 * SIZE)
    )
    return Figure(once, twice / max(once, LEAST), text)


def finalists(name: str) -> tuple[Iterable[tuple[str, str]], Iterable[tuple[str, str]]]:
    """The texts that look slowest, or as if time grows faster than text, in one piece; those that do in pieces."""
    looks: list[list[tuple[float, tuple[str, str]]]] = [[], [], [], []]
    for text in texts(name):
        whole = seconds(name, repeated(*text, SIZE), SIZE)
        quarter = seconds(name, repeated(*text, SIZE // 4), SIZE)
        cut = seconds(name, repeated(*text, SIZE // CUT_PART), PIECE)
        less = seconds(name, repeated(*text, SIZE // CUT_PART // 4), PIECE)
        values = (whole, whole / max(quarter, LEAST), cut - less, cut / max(less, LEAST))
        for look, value in zip(looks, values, strict=True):
            look.append((value, text))
    slowest, growing, slowest_cut, growing_cut = ([text for _, text in sorted(look, reverse=True)] for look in looks)
    return (
        dict.fromkeys(slowest[:FINALISTS] + growing[:FINALISTS]),
        dict.fromkeys(slowest_cut[:FINALISTS] + growing_cut[:1]),
    )


def main() -> int:
    failed = False
    print(f"{'format':20} {'one piece':>18}  {'pieces':>14}   slowest texts")
    for name in sys.argv[1:] or OPENINGS:
        wholes, cuts = finalists(name)
        whole = [measure(name, text, 0) for text in wholes]
        cut = [measure(name, text, PIECE) for text in cuts]
        print(
            f"{name:20} {max(whole).once * 1e3:8.0f} ms, x{max(one.growth for one in whole):.2f}"
            f"  {max(cut).once:6.2f} s, x{max(one.growth for one in cut):.2f}"
            f"   {''.join(max(whole).text)!r}  {''.join(max(cut).text)!r}",
            flush=True,
        )
        for found, limit in ((whole, WHOLE_LIMIT), (cut, CUT_LIMIT)):
            for one in found:
                if one.once > limit or one.growth > GROWTH_LIMIT:
                    failed = True
                    print(f"over: {''.join(one.text)!r}: {one.once:.3f} s (limit {limit:g}), x{one.growth:.2f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
