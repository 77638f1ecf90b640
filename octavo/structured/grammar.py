"""From what a request asks for to the grammar that the engine follows, or the reason why not.

A compiled grammar is llguidance's own text: JSON with a list of grammars, the first of which describes the output. It
has been compiled once against the model's vocabulary under the limits that the engine compiles with, so it compiles
there too. Does not choose tokens: that is masks.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from octavo.core.params import StructuredOutputs
from octavo.structured.closing import close_objects, tell_apart
from octavo.structured.keywords import checked_schema, refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

    from octavo.structured.tokens import Vocabulary

MAX_BYTES = 65_536
"""Of a schema, or of all choices together."""
MAX_REGEX_BYTES = 4096
MAX_GRAMMAR_BYTES = 16_384
"""Of a Lark or GBNF grammar, or of all patterns of a schema together."""
MAX_PATTERN_BYTES = 2048
"""Of one of these patterns or lines of a grammar: a chain of optional parts takes quadratic time."""
MAX_TEXT_BYTES = 4096
"""Of one text to choose, or one text or name in a schema: a mask takes 0.7 ms for each KB that is left of it."""
MAX_CHOICES = 2000
MAX_RULES = 1000
"""Of a Lark or GBNF grammar: llguidance recurses into rules on the thread's stack."""
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,32}"
"""Between the tokens of JSON, once in a place: a space, or a line break and some indentation."""


@cache
def limits() -> LLParserLimits:
    """What compiling, one mask and all masks of a grammar may cost.

    One step of the lexer's fuel measured 10 to 70 ns, a lexer state 1 to 2 KB.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=30_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def compile_grammar(spec: StructuredOutputs, vocabulary: Vocabulary) -> str:
    """The grammar of `spec`, compiled once to see that it works.

    Raises InvalidRequest with param "structured_outputs" that names what is wrong. Takes milliseconds for usual schemas
    and about 0.2 s at worst, most of it without the GIL: not for an event loop.
    """
    if not vocabulary.eos:
        raise refused("the model has no end-of-sequence token, so its text could not end where the grammar does")
    grammar = _grammar(spec)
    if spec.lead:
        grammar = _led(grammar, spec.lead)
    check(new_matcher(grammar, vocabulary))
    return grammar


def new_matcher(grammar: str, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher at the grammar's beginning; in its error state when the grammar cannot be compiled."""
    from llguidance import LLMatcher

    return LLMatcher(vocabulary.prepare(), grammar, log_level=0, limits=limits())


def check(matcher: LLMatcher) -> None:
    """Raises InvalidRequest unless the matcher is well and some token may come first."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise refused(_reason(matcher.get_error()))


def _reason(error: str) -> str:
    """llguidance's message without its state."""
    line = error.split("<state>")[0].replace("<non-verbose/>", "").strip()
    if line.startswith("NoExtension"):
        return "nothing satisfies the constraint"
    return re.sub(r"\s+", " ", line)[:300]


def _grammar(spec: StructuredOutputs) -> str:
    if spec.json is not None:
        return json_schema_grammar(spec.json)
    if spec.json_object:
        return json_schema_grammar({"type": "object"})
    if spec.regex is not None:
        return _regex_grammar(spec.regex)
    if spec.choice is not None:
        return _choice_grammar(spec.choice)
    assert spec.grammar is not None
    return _lark_grammar(spec.grammar)


def json_schema_grammar(schema: Mapping[str, Any] | str) -> str:
    """The grammar of JSON texts that satisfy `schema`, an object or its text; see keywords.KEYWORDS."""
    if isinstance(schema, str):
        _check_size("the schema", schema, MAX_BYTES)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise refused(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise refused(f"a schema is an object, not {type(schema).__name__}")
    copy, places = checked_schema(schema)
    patterns = _patterns(copy)
    for pattern in patterns:
        _check_size("a pattern of the schema", pattern, MAX_PATTERN_BYTES)
    _check_size("all patterns of the schema together", "".join(patterns), MAX_GRAMMAR_BYTES)
    for text in _texts(copy):
        _check_size("a text of the schema", text, MAX_TEXT_BYTES)
    tell_apart(places)
    copy["x-guidance"] = {"whitespace_pattern": WHITESPACE}
    as_sent = _text({"json_schema": copy})
    _check_size("the schema", as_sent, MAX_BYTES)
    if any(isinstance(part, dict) and "oneOf" in part for part in places.values()):
        _check_exclusion(as_sent)
    close_objects(places)
    return _text({"json_schema": copy})


def _check_exclusion(grammar: str) -> None:
    """The schemas of a oneOf must exclude each other as they were sent: closed objects may where open ones do not."""
    from llguidance import LLMatcher

    if error := LLMatcher.validate_grammar(grammar, limits=limits()):
        raise refused(_reason(error))


def _texts(value: object) -> Iterator[str]:
    """All names and texts in a JSON value."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            yield from item
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item


def _patterns(schema: Mapping[str, Any]) -> list[str]:
    """All regular expressions in the keywords of a checked schema; a few more from its data do no harm."""
    found: list[str] = []
    left: list[Any] = [schema]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            pattern, patterns = item.get("pattern"), item.get("patternProperties")
            found += [pattern] if isinstance(pattern, str) else []
            found += patterns if isinstance(patterns, Mapping) else []
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
    return found


def _regex_grammar(regex: str) -> str:
    from llguidance import LLMatcher

    _check_size("the regex", regex, MAX_REGEX_BYTES)
    return LLMatcher.grammar_from_regex(regex)


def _choice_grammar(choices: Sequence[str]) -> str:
    if len(choices) > MAX_CHOICES:
        raise refused(f"choice has {len(choices)} texts, more than {MAX_CHOICES}")
    _check_size("choice", "".join(choices), MAX_BYTES)
    for text in choices:
        _check_size("a text of choice", text, MAX_TEXT_BYTES)
    if "" in choices:
        raise refused("choice has an empty text")
    return _text({"lark_grammar": "start: " + " | ".join(map(_quoted, dict.fromkeys(choices)))})


def _quoted(text: str) -> str:
    """A literal of Lark: JSON's escapes, with every control character by its number."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _lark_grammar(grammar: str) -> str:
    from llguidance import grammar_from

    _check_size("the grammar", grammar, MAX_GRAMMAR_BYTES)
    if grammar.count(":") > MAX_RULES:
        raise refused(f"the grammar has more than {MAX_RULES} rules")
    for line in grammar.splitlines():
        _check_size("a line of the grammar", line, MAX_PATTERN_BYTES)
    try:
        lark = grammar_from("grammar", grammar)
    except ValueError as error:
        raise refused(str(error)[:300]) from None
    return _text({"lark_grammar": lark})


def _led(grammar: str, lead: str) -> str:
    """The rules of `lead`, in which @then is `grammar`."""
    first, *rest = json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lead}, {**first, "name": "then"}, *rest]}, ensure_ascii=False)


def _text(grammar: dict[str, Any]) -> str:
    return json.dumps({"grammars": [grammar]}, ensure_ascii=False)


def _check_size(what: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise refused(f"{what} has an unpaired surrogate: send valid Unicode") from None
    if size > limit:
        raise refused(f"{what} has {size} bytes, more than {limit}")
