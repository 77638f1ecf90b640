"""Times the output parsers on text that is made to be slow to parse: python tools/parser_speed.py [FORMAT ...].

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

from octavo.text.parsing import Formats, OutputParser, build_parser

SIZE = 1_000_000
PIECE = 4
WHOLE_LIMIT, CUT_LIMIT, GROWTH_LIMIT = 0.100, 1.0, 2.3
CUT_PART = 16  # the first look at pieces reads this part of the text
FINALISTS = 3  # of each kind
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
}

PATTERNS = [
    *(
        "<",
        "{",
        "[",
        "(",
        '"',
        "'",
        "\\",
        " ",
        "\n",
        "a",
        "1",
        "é😀",
        ",",
        "}",
        "]",
        "<|",
        "</",
        "[T",
        "`",
        "-",
        "=",
        ";",
    ),
    *('"\\', '"\\"', "\\n", "\\\\", "\\u00e9", "\\x41", "\\\\n", "\\ud83d\\ude00", '"\\u00e9",', "\\'", "\t\r\n "),
    *(
        "[]",
        "{}",
        "[],",
        "{},",
        "[[],",
        "[1,",
        '{"a":',
        '{"a":[',
        '[{"":',
        '{"a":{"a":1},"b":',
        "1,",
        '"",',
        "'',",
        "'a',\"a\",",
    ),
    *(
        "[1],",
        "[[1]],",
        "[[[1]]],",
        "[[[[1]]]],",
        "[[[[1]]],",
        "[[1],",
        "1],",
        "true,",
        "null]",
        "[[{}],",
        '{"a":1},',
        "a=1,",
        "f(),",
    ),
    *(
        '{"name":',
        '{"name":"f"},',
        '{"name":"f","arguments":{}},',
        "[f(a=1)]",
        "f(a=1),",
        '{"parameters":{}',
        '"name":"f",',
    ),
    *('{"name":"f","parameters":{}};', '"x":1,', "<think>", "</think>", "[f(a=[", "{1:", "True,", "1.5e3,", '{"":"",'),
]

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
}


def texts(name: str) -> Iterator[tuple[str, str]]:
    """(opening, pattern): the text is the opening and then the pattern over and over."""
    patterns = [*PATTERNS, *ROUTES[name]]
    yield from (("", pattern) for pattern in patterns)
    yield from ((opening, pattern) for opening in OPENINGS[name] for pattern in patterns)


def repeated(opening: str, pattern: str, size: int) -> str:
    return (opening + pattern * (size // len(pattern) + 1))[:size]


def parser(name: str, in_reasoning: bool = False) -> OutputParser:
    """A parser of the tool format, or of the reasoning format "think:NAME"."""
    if name == "json":
        return build_parser(Formats(), TOOLS, in_reasoning=False, call="json")
    return build_parser(Formats(tool=name), TOOLS, in_reasoning=in_reasoning)


def seconds(name: str, text: str, piece: int) -> float:
    """Process time of one parse, without that of cutting the text."""
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    reader = parser(name)
    begin = time.process_time()
    for part in pieces:
        reader.push(part)
    reader.finish()
    return time.process_time() - begin


def median(name: str, text: str, piece: int) -> float:
    return statistics.median(seconds(name, text, piece) for _ in range(3))


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians for 1 MB in seconds, and how many times as long 2 MB takes: the worse of one piece and many."""

    text: tuple[str, str]
    whole: float
    cut: float
    growth: float

    def exceeds(self) -> bool:
        return self.whole > WHOLE_LIMIT or self.cut > CUT_LIMIT or self.growth > GROWTH_LIMIT


def measure(name: str, text: tuple[str, str]) -> Figures:
    once, twice = repeated(*text, SIZE), repeated(*text, 2 * SIZE)
    whole, cut = median(name, once, SIZE), median(name, once, PIECE)
    growth = max(
        median(name, twice, 2 * SIZE) / max(whole, LEAST),
        median(name, twice, PIECE) / max(cut, LEAST),
    )
    return Figures(text, whole, cut, growth)


def finalists(name: str) -> Iterable[tuple[str, str]]:
    """The texts that look slowest: in one piece, in pieces, and in growth (from a quarter to all of the text)."""
    looks: list[list[tuple[float, tuple[str, str]]]] = [[], [], []]
    for text in texts(name):
        whole = seconds(name, repeated(*text, SIZE), SIZE)
        quarter = seconds(name, repeated(*text, SIZE // 4), SIZE)
        cut = seconds(name, repeated(*text, SIZE // CUT_PART), PIECE)
        for look, value in zip(looks, (whole, cut, whole / max(quarter, LEAST)), strict=True):
            look.append((value, text))
    return dict.fromkeys(text for look in looks for _, text in sorted(look, reverse=True)[:FINALISTS])


def main() -> int:
    failed = False
    print(f"{'format':12} {'whole':>8} {'pieces':>8} {'growth':>7}  slowest in one piece; in pieces")
    for name in sys.argv[1:] or OPENINGS:
        found = [measure(name, text) for text in finalists(name)]
        whole, cut = max(found, key=lambda one: one.whole), max(found, key=lambda one: one.cut)
        growth = max(one.growth for one in found)
        print(
            f"{name:12} {whole.whole * 1e3:5.0f} ms {cut.cut:6.2f} s {growth:7.2f}"
            f"  {''.join(whole.text)!r}; {''.join(cut.text)!r}",
            flush=True,
        )
        for one in filter(Figures.exceeds, found):
            failed = True
            print(f"over: {one.text!r}: {one.whole * 1e3:.0f} ms, {one.cut:.2f} s, x{one.growth:.2f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
