"""Reasoning between tags at the beginning of an output, in front of whatever format follows.

The tags are looked for only where models write them, at the beginning: later ones are content. Whitespace inside the
tags' ends and after them is dropped.
"""

from __future__ import annotations

from octavo.text.parsing.events import Reasoning
from octavo.text.parsing.source import Source, Steps, marks


def tagged_reasoning(source: Source, begin: str, end: str, inside: bool) -> Steps[None]:
    """`begin` reasoning `end`; with `inside` the prompt has written `begin` (and the model may repeat it).

    Reasoning that the output's end cuts off is reasoning all the same.
    """
    yield from source.spaces()
    opened = yield from source.literal(begin)
    if not (opened or inside):
        return
    if opened:
        source.drop()
    source.skip_space()
    if (yield from source.upto(marks(end), lambda at: source.say(Reasoning, at))):
        source.drop()
    else:
        source.release(Reasoning)
