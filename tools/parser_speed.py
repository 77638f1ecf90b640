"""Times the output parsers on text that is made to be slow to parse: python tools/parser_speed.py [FORMAT ...].

Every format reads every text three ways: 1 MB in one piece (limit 100 ms), 1 MB in pieces of 4 characters (1 s), 2 MB
in one piece (2.3 times as long as 1 MB). Prints what exceeds a limit and each format's slowest text; exits with 1 if
any does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from octavo.text.parsing import Formats, OutputParser, build_parser

SIZE = 1_000_000
PIECE = 4
LIMITS = (0.100, 1.0, 2.3)

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


def best(name: str, text: str, piece: int, limit: float) -> float:
    """The quickest of up to three parses: the first within the limit ends it."""
    took = seconds(name, text, piece)
    for _ in range(2):
        if took <= limit:
            break
        took = min(took, seconds(name, text, piece))
    return took


def check(name: str, opening: str, pattern: str) -> tuple[float, float, float]:
    text = repeated(opening, pattern, SIZE)
    whole = best(name, text, SIZE, LIMITS[0])
    cut = best(name, text, PIECE, LIMITS[1])
    twice = seconds(name, repeated(opening, pattern, 2 * SIZE), 2 * SIZE)
    for _ in range(4):
        if twice <= LIMITS[2] * max(whole, 0.002):
            break
        whole = max(whole, seconds(name, text, SIZE))
        twice = min(twice, seconds(name, repeated(opening, pattern, 2 * SIZE), 2 * SIZE))
    return whole, cut, twice / max(whole, 0.002)


def main() -> int:
    names = sys.argv[1:] or list(OPENINGS)
    failed = 0
    for name in names:
        worst = [(0.0, "")] * 3
        for opening, pattern in texts(name):
            found = check(name, opening, pattern)
            for at, value in enumerate(found):
                worst[at] = max(worst[at], (value, opening + pattern))
            if any(value > limit for value, limit in zip(found, LIMITS, strict=True)):
                failed += 1
                print(f"{name}: {opening!r} + {pattern!r}: {found[0] * 1e3:.0f} ms, {found[1]:.2f} s, x{found[2]:.2f}")
        slowest = ", ".join(f"{value:.3f} {text!r}" for value, text in worst)
        print(f"{name}: worst {slowest}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
