"""What is free of an answer whose rest is constrained: reasoning before it, calls of tools instead of it.

Owns the grammar of that: Lark rules in which `@then` is the constraint. Control tokens are no text to a grammar, so
they stand in it by their ids. How the same text is read is the other modules' business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from octavo.text.parsing.formats import Format, Formats, chosen, is_harmony, reasoning_is_over, starts_in_reasoning

_TEXT = "TEXT: /(?s:.*)/"
_PARTS = {" ": "SPACE?", "#": "NUMBER", "NAME": "name"}
"""What stands in a format's openings for something else."""
_TERMINALS = (r"SPACE: /[ \t\r\n]{1,8}/", "NUMBER: /[0-9]{1,4}/")
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


def lead(formats: Formats, prompt_tail: str, control: Mapping[str, int], calls: Sequence[str] = ()) -> str:
    """The rules for answers to a prompt with this end; "" where the constraint holds from the first token on.

    `control` are the ids of control tokens by their text, `calls` the names of tools that may be called.
    """
    tool, reasoning = chosen(formats)
    if is_harmony(tool, reasoning):
        begun = starts_in_reasoning(formats, prompt_tail)
        return _harmony(control, begun, calls) if control.keys() >= {*_HARMONY} else ""
    rules = [_TEXT]
    before, then = "", "@then"
    if reasoning is not None and reasoning.tags is not None and not reasoning_is_over(formats, prompt_tail):
        begun = starts_in_reasoning(formats, prompt_tail)
        before = "think " if begun else "think? "
        rules += _think(*reasoning.tags, begun, control)
    if tool is not None and calls:
        then = "(@then | call)"
        rules += _call(tool, calls, control)
    return "\n".join([f"start: {before}{then}", *rules]) if len(rules) > 1 else ""


def _token(text: str, control: Mapping[str, int]) -> str:
    return f"<[{control[text]}]>" if text in control else json.dumps(text, ensure_ascii=False)


def _think(begin: str, end: str, begun: bool, control: Mapping[str, int]) -> list[str]:
    opening = "" if begun else f"{_token(begin, control)} "
    lazy = "" if end in control else "[lazy]"
    return [f"think: {opening}thought", f"thought{lazy}: TEXT {_token(end, control)}"]


def _call(tool: Format, calls: Sequence[str], control: Mapping[str, int]) -> list[str]:
    """What begins as a call goes on freely, with the format's control tokens."""
    ids = sorted(control[marker] for marker in tool.markers if marker in control)
    more = f" (<[{','.join(map(str, ids))}]> TEXT)*" if ids else ""
    openings = " | ".join(_opening(form, tool.markers, control) for form in tool.openings)
    return [
        f"call: ({openings}) TEXT{more}",
        f"name: {' | '.join(map(json.dumps, calls))}",
        *_TERMINALS,
    ]


def _opening(form: str, markers: Sequence[str], control: Mapping[str, int]) -> str:
    parts = re.split(f"({'|'.join(map(re.escape, (*markers, *_PARTS)))})", form)
    return " ".join(_PARTS.get(part) or _token(part, control) for part in parts if part)


def _harmony(control: Mapping[str, int], begun: bool, calls: Sequence[str]) -> str:
    """Messages before the one in channel final, which is constrained; or a call."""
    start, channel, message, end = (_token(text, control) for text in _HARMONY)
    rules = [
        f"start: {f'TEXT {end} {start} ROLE ' if begun else ''}early* (final @then{' | call' if calls else ''})",
        f"early: {channel} EARLY {message} TEXT {end} {start} ROLE",
        f'final: {channel} "final" {message}',
        "ROLE: /assistant(?s:.*)/",
        "EARLY: /(analysis|commentary)(?s:.*)/",
        _TEXT,
    ]
    if calls:
        kind = f" ({_token('<|constrain|>', control)} TEXT)?" if "<|constrain|>" in control else ""
        rules += [
            f"call: {channel} CALL{kind} {message} TEXT",
            rf"CALL: /commentary to=functions\.({'|'.join(map(re.escape, calls))})(?s:.*)/",
        ]
    return "\n".join(rules)
