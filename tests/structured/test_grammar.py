from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams, StructuredOutputs
from octavo.structured import Vocabulary, compile_grammar
from octavo.structured.grammar import MAX_BYTES, MAX_CHOICES, new_matcher
from tests.frontend.tiny import EOS, byte_tokenizer
from tests.structured.schemas import accepts, allowed, byte_vocabulary, random_text

VOCABULARY = byte_vocabulary()


def after(end: str) -> str:
    """Rules for any text that ends with the first `end`."""
    return f"start: free @then\nfree[lazy]: TEXT {json.dumps(end)}\nTEXT: /(?s:.*)/"


def compiled(**spec: Any) -> str:
    return compile_grammar(StructuredOutputs(**spec), VOCABULARY)


@pytest.mark.parametrize(("given", "words"), [
    ({}, "not none"),
    ({"json": {}, "regex": "a"}, "not json and regex"),
    ({"json": 3}, "json cannot be int"),
    ({"regex": 3}, "regex cannot be int"),
    ({"json_object": False}, "not none"),
    ({"json_object": 1}, "json_object cannot be int"),
    ({"choice": "abc"}, "choice cannot be str"),
    ({"choice": []}, "at least one"),
    ({"choice": ["a", 1]}, "at least one"),
    ({"regex": "a", "lead": None}, "lead is text"),
])  # fmt: skip
def test_exactly_one_form_of_the_right_type(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        StructuredOutputs(**given)
    assert caught.value.param == "structured_outputs"


def test_parameters_take_the_struct_alone() -> None:
    with pytest.raises(InvalidRequest, match="must be StructuredOutputs, not dict"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "good", "bad"), [
    ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": 1\n}'], ["[]", "", " {}", "{} ", '{"a"}']),
    ({"regex": "[0-9]{2,3}(st|nd)?"}, ["12", "123st"], ["1", "1234", "12s", "x12"]),
    ({"regex": "a|bc"}, ["a", "bc"], ["ac", "ab"]),
    ({"regex": "."}, ["ä", "€", "😀"], ["\n", "ab"]),
    ({"choice": ["yes", "yes sir", 'q"\\\n\x7f', "ж"]}, ["yes", "yes sir", 'q"\\\n\x7f', "ж"], ["ye", "yes si", "no"]),
    ({"grammar": 'start: "a" NUM ("," NUM)*\nNUM: /[0-9]+/'}, ["a1", "a1,22"], ["a", "a1,"]),
    ({"grammar": 'root ::= "x" item+\nitem ::= [a-c] | "-" item'}, ["xa", "x-b--c"], ["x", "xd", "x-"]),
    ({"regex": "[0-9]+", "lead": after("</think>")}, ["</think>1", "a <b> é </think>42", "<</think>1"],
     ["1", "</think>", "</think> 1", "a</think>1</think>2"]),
    ({"json": {"enum": [1]}, "lead": after("\n\n")}, ["\n\n1", "so:\n\n1"], ["\n1", "\n\n\n1"]),
    ({"choice": ["a"], "lead": after(".")}, [".a", "b.a"], ["a", "..a"]),
    ({"grammar": 'start: "a"+', "lead": after("#")}, ["x#a", "#aa"], ["aa", "x#"]),
])  # fmt: skip
def test_what_a_form_allows(spec: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = compiled(**spec)
    assert [text for text in good if not accepts(grammar, text, VOCABULARY)] == []
    assert [text for text in bad if accepts(grammar, text, VOCABULARY)] == []


@pytest.mark.parametrize(("spec", "words"), [
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?<=a)b"}, "look-around"),
    ({"regex": "a" * 5000}, "the regex has 5000 bytes"),
    ({"choice": ["a" * 5000]}, "a text of choice has 5000 bytes"),
    ({"json": {"const": ["a" * 5000]}}, "a text of the schema has 5000 bytes"),
    ({"json": {"properties": {"a" * 5000: {}}}}, "a text of the schema has 5000 bytes"),
    ({"regex": "[^\\s\\S]"}, "nothing satisfies"),
    ({"choice": ["a", ""]}, "empty text"),
    ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, f"more than {MAX_CHOICES}"),
    ({"choice": ["a" * (MAX_BYTES + 1)]}, f"more than {MAX_BYTES}"),
    ({"choice": ["\udc00"]}, "surrogate"),
    ({"grammar": "start: missing"}, "missing"),
    ({"grammar": 'root ::= "x'}, "GBNF"),
    ({"grammar": "start: <[300]>"}, "300"),
    ({"grammar": "start: <|gone|>"}, "gone"),
    ({"grammar": "start: a\na: a \"x\""}, "nothing satisfies"),
    ({"grammar": 'start: %json {"not": {}}'}, "not"),
])  # fmt: skip
def test_refusals_say_why(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        compiled(**spec)


def test_json_never_has_endless_white_space() -> None:
    matcher = new_matcher(compiled(json={"type": "array", "items": {"const": 1}}), VOCABULARY)
    assert matcher.consume_tokens(list(b"[\n"))
    indented = 0
    while ord(" ") in allowed(matcher.compute_bitmask()):
        assert matcher.consume_token(ord(" "))
        indented += 1
    assert indented == 32
    assert allowed(matcher.compute_bitmask()) == sorted(b"1]")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def chain(count: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "null"}}}


def tripled(name: str) -> str:
    return "\n".join(f"{name}{i}:" + f" {name}{i + 1}" * 3 for i in range(20))


HOSTILE: list[Callable[[], dict[str, Any]]] = [
    lambda: {"regex": "(a+)+b"},
    lambda: {"regex": "[ab]{1,100000}"},
    lambda: {"regex": "(([ab]{1,1000}){1,1000}){1,1000}"},
    lambda: {"regex": ".*a.{200}b"},
    lambda: {"regex": "a?" * 2000},
    lambda: {"regex": "(a|b)?" * 600},
    lambda: {"regex": "(.*a){500}"},
    lambda: {"regex": "|".join(f"w{i}x" for i in range(600))},
    lambda: {"regex": "(" * 2000 + ")" * 2000},
    lambda: {"json": nested(95)},
    lambda: {"json": nested(5000)},
    lambda: {"json": chain(150)},
    lambda: {"json": chain(5000)},
    lambda: {"json": {"anyOf": [{"const": i} for i in range(4000)]}},
    lambda: {"json": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": i}}} for i in range(900)]}},
    lambda: {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(6000)}}},
    lambda: {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(900)}}},
    lambda: {"json": {"enum": [f"v{i}" for i in range(7000)]}},
    lambda: {"json": {"const": [0] * 20_000}},
    lambda: {"json": {"const": {f"k{i}": i for i in range(5000)}}},
    lambda: {"json": {"type": "array", "minItems": 100_000, "items": {"type": "array", "minItems": 100_000}}},
    lambda: {"json": {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(8)]} for i in range(8)]}},
    lambda: {"json": {"allOf": [{"type": "integer", "multipleOf": p} for p in (997, 991, 983, 977)]}},
    lambda: {"json": {"properties": {f"k{i}": {"pattern": f"^(.*a.{{20}}){{{i}}}$"} for i in range(300)}}},
    lambda: {"json": {"properties": {f"k{i}": {"pattern": "a?" * 1000} for i in range(30)}}},
    lambda: {"json": {"patternProperties": {f"^{i}(.*a){{20}}$": {} for i in range(100)}, "type": "object"}},
    lambda: {"json": {"oneOf": [{"type": "object", "required": [f"k{i}"]} for i in range(900)]}},
    lambda: {"json": {"type": "number", "minimum": 1.2345678901234567e-18, "maximum": 1.2345678901234567e18}},
    lambda: {"choice": [f"option number {i}" for i in range(2000)]},
    lambda: {"choice": ["ab" * 32_000]},
    lambda: {"grammar": "start: " + "(" * 2000 + '"a"' + ")" * 2000},
    lambda: {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "x"'},
    lambda: {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(800)) + '\nr800: "x"'},
    lambda: {"grammar": "start: R0\n" + tripled("R") + "\nR20: /x*y/"},
    lambda: {"grammar": "start: r0\n" + tripled("r") + '\nr20: "x"'},
    lambda: {"grammar": "start: (((a{2,300}){2,300}){2,300}){2,300}\na: \"x\" \"y\""},
    lambda: {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000},
    lambda: {"grammar": "root ::= " + "\n | ".join('"a"? [b-z]*' for _ in range(1000))},
    lambda: {"grammar": "start: A A A\nA: A0 A1 A2\n" + "\n".join(f"A{i}: /{'a?' * 900}/" for i in range(8))},
]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
def test_hostile_constraints_cost_little(make: Callable[[], dict[str, Any]]) -> None:
    """0.2 s of processor time, a bound of the issue, with room for a slow machine."""
    spec = make()
    began = time.process_time()
    with contextlib.suppress(InvalidRequest):
        compiled(**spec)
    assert time.process_time() - began < 0.6
    schema = spec.get("json", {})
    while "items" in schema:  # freed without recursion
        schema = schema.pop("items")


def test_all_end_tokens_end_a_grammar() -> None:
    vocabulary = Vocabulary(byte_tokenizer(), 300, (EOS, 299, 1000))
    matcher = new_matcher(compile_grammar(StructuredOutputs(regex="a+"), vocabulary), vocabulary)
    assert allowed(matcher.compute_bitmask()) == [ord("a")]
    assert matcher.consume_token(ord("a"))
    assert allowed(matcher.compute_bitmask()) == [ord("a"), EOS, 299]


def test_without_an_end_token_there_is_no_grammar() -> None:
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        compile_grammar(StructuredOutputs(regex="a"), Vocabulary(byte_tokenizer(), 300, ()))


def test_random_texts_of_a_regex_match_it() -> None:
    for seed, regex in enumerate(
        ["[a-f]{3}[0-9]?", "(ab|c[d-z]){1,3}", "\\d{1,3}(,\\d{3}){0,2}", "[^\\n\\x00-\\x1f]{5}"]
    ):
        text = random_text(compiled(regex=regex), VOCABULARY, seed).decode()
        assert re.fullmatch(regex, text), text
    assert json.loads(random_text(compiled(json_object=True), VOCABULARY, 5)) is not None
