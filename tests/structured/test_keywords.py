from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from octavo.core.errors import InvalidRequest
from octavo.core.params import StructuredOutputs
from octavo.structured import ANNOTATIONS, KEYWORDS, compile_grammar, json_schema_grammar
from octavo.structured.keywords import FORMATS, MAX_JSON_DEPTH, checked_schema
from tests.structured.schemas import accepts, byte_vocabulary, leaves, random_text, schemas

VOCABULARY = byte_vocabulary()


def test_there_are_schemas_for_every_keyword() -> None:
    text = json.dumps(schemas())
    assert len(schemas()) >= 200
    assert [name for name in KEYWORDS if f'"{name}":' not in text] == []
    assert [name for name in FORMATS if f'"{name}"' not in text] == []


def test_every_schema_compiles_and_its_texts_validate() -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for seed, schema in enumerate(schemas()):
        grammar = compile_grammar(StructuredOutputs(json=schema), VOCABULARY)
        text = random_text(grammar, VOCABULARY, seed)
        value = json.loads(text)
        error = next(jsonschema.Draft202012Validator(schema, format_checker=checker).iter_errors(value), None)
        assert error is None, f"{text!r} of {schema}: {error and error.message}"


@pytest.mark.parametrize("name", [
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "contains",
    "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties", "additionalItems",
    "$dynamicRef", "$dynamicAnchor", "$anchor", "$id", "$vocabulary", "x-guidance", "nullable", "typo",
])  # fmt: skip
@pytest.mark.parametrize("place", ["{}", '{{"properties":{{"a":{}}}}}', '{{"$defs":{{"d":{{"items":{}}}}}}}'])
def test_a_keyword_that_is_not_enforced_is_named(name: str, place: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}'".replace("$", r"\$")) as caught:
        json_schema_grammar(place.format(json.dumps({name: {}})))
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "strin"}, "type at #"),
    ({"type": []}, "type at #"),
    ({"type": "string", "format": "semver"}, "format at # cannot be 'semver'"),
    ({"properties": {"a/b": {"format": "uri-reference"}}}, "format at #/properties/a~1b"),
    ({"minimum": "3"}, "minimum"),
    ({"minimum": True}, "minimum"),
    ({"exclusiveMinimum": True, "minimum": 1}, "exclusiveMinimum"),
    ({"minimum": float("nan")}, "not finite"),
    ({"maximum": float("inf")}, "not finite"),
    ({"enum": [10**400]}, "not finite"),
    ({"maximum": 1e300}, "maximum"),
    ({"multipleOf": 0}, "multipleOf"),
    ({"multipleOf": -2}, "multipleOf"),
    ({"multipleOf": 99991}, "multipleOf"),
    ({"multipleOf": 0.000007919}, "multipleOf"),
    ({"minLength": -1}, "minLength"),
    ({"minLength": 1.5}, "minLength"),
    ({"maxItems": 10**9}, "maxItems"),
    ({"required": "a"}, "required"),
    ({"required": [1]}, "required"),
    ({"enum": []}, "enum"),
    ({"anyOf": []}, "anyOf"),
    ({"anyOf": {"a": 1}}, "anyOf"),
    ({"items": [{}]}, "a schema is an object or a boolean"),
    ({"properties": []}, "properties"),
    ({"properties": {"a": 3}}, "#/properties/a"),
    ({"pattern": 3}, "pattern"),
    ({"pattern": "(?=a)b"}, "look-around"),
    ({"pattern": "(a)\\1"}, "backreference"),
    ({"pattern": "a" * 5000}, "pattern of the schema has 5000 bytes"),
    ({"$ref": "#/$defs/gone"}, "'#/\\$defs/gone'"),
    ({"$ref": "https://example.org/s"}, "example.org"),
    ({"$ref": "#/enum/0", "enum": [{}]}, "#/enum/0"),
    ({"$ref": "#"}, "nothing satisfies"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "nothing satisfies"),
    ({"$schema": "http://json-schema.org/draft-04/schema#"}, "draft-04"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"properties": {"a": {}, "b": {}}, "additionalProperties": True, "minProperties": 1}, "maxProperties"),
    ({"oneOf": [{"type": "object", "properties": {"a": {}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {}}}]}, "oneOf"),
    ({"patternProperties": {"^a": {}, "b$": {}}, "type": "object"}, "disjoint"),
    ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "nsatisfiable"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "nsatisfiable"),
    ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "nsatisfiable"),
    ({"enum": [{1}]}, "set"),
    ({"enum": [{1: 2}]}, "not text"),
    ({"const": "\ud800"}, "surrogate"),
    ("[1", "not JSON"),
    ("[]", "not list"),
    ("true", "not bool"),
    ('{"minimum": NaN}', "not finite"),
    ('{"minimum": ' + "9" * 5000 + "}", "not JSON"),
    ("[" * 20_000, "not JSON"),
])  # fmt: skip
def test_what_cannot_be_enforced_is_refused_with_the_reason(schema: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        compile_grammar(StructuredOutputs(json=schema), VOCABULARY)


def test_deep_schemas_are_refused_without_recursion() -> None:
    schema: Any = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match=f"more than {MAX_JSON_DEPTH}"):
        json_schema_grammar(schema)
    while schema:  # nor may the interpreter recurse to free it
        schema = schema.pop("items")


def test_large_schemas_are_refused() -> None:
    large: list[Any] = [
        {"const": [0] * 20_000},
        {"anyOf": [{}] * 1600},
        {"properties": {f"k{i}": {} for i in range(501)}},
    ]
    for schema in large:
        with pytest.raises(InvalidRequest, match="more than"):
            json_schema_grammar(schema)


def test_annotations_constrain_nothing_and_are_left_out() -> None:
    schema = dict.fromkeys(ANNOTATIONS, "anything") | {
        "type": "null",
        "$schema": "http://json-schema.org/draft-07/schema#",
    }
    assert checked_schema(schema)[0] == {"type": "null"}


def test_properties_come_in_the_schemas_order() -> None:
    schema = {"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["a", "z"],
              "additionalProperties": False}  # fmt: skip
    text = random_text(compile_grammar(StructuredOutputs(json=schema), VOCABULARY), VOCABULARY, 0)
    assert [*json.loads(text)] == ["z", "a"]


def test_a_schema_may_come_as_text() -> None:
    for schema in leaves():
        assert json_schema_grammar(json.dumps(schema)) == json_schema_grammar(schema)


KINDS = [{"type": "object", "properties": {"kind": {"const": kind}, kind: {"type": "null"}}, "required": ["kind"]}
         for kind in "ab"]  # fmt: skip
A, B = ({"properties": {name: {"type": "null"}}} for name in "ab")
BOTH = '{"a":null,"b":null}'


@pytest.mark.parametrize(("schema", "good", "bad"), [
    (A, ["{}", '{"a":null}'], [BOTH]),
    (A | {"additionalProperties": True}, [BOTH], []),
    (A | {"additionalProperties": {"type": "null"}}, [BOTH], ['{"b":1}']),
    (A | {"patternProperties": {"^b": {"type": "null"}}}, [BOTH], []),
    (A | {"required": ["b"]}, ['{"b":1}', BOTH], ["{}"]),
    (A | {"minProperties": 1}, ['{"a":null}'], ["{}", '{"b":1}']),
    ({"type": "object"}, ["{}", BOTH], []),
    ({"items": A}, ['[{"a":null}]'], [f"[{BOTH}]"]),
    ({"properties": {"x": A}}, ['{"x":{"a":null}}'], [f'{{"x":{BOTH}}}', '{"y":1}']),
    ({"anyOf": [A | {"type": "object"}, {"type": "null"}]}, ["null", '{"a":null}'], [BOTH]),
    ({"oneOf": KINDS, "discriminator": {"propertyName": "kind"}}, ['{"kind":"a","a":null}'], ['{"kind":"a","b":null}']),
    ({"allOf": [A, B]}, [BOTH, '{"a":null,"b":null,"c":1}'], []),
    ({"allOf": [{"$ref": "#/$defs/d"}], "$defs": {"d": A}}, ['{"a":null}'], [BOTH]),
    ({"$ref": "#/$defs/d", "$defs": {"d": A}}, ['{"a":null}'], [BOTH]),
    (B | {"$ref": "#/$defs/d", "$defs": {"d": A}}, ['{"b":null,"a":null}'], []),
    ({"properties": {"x": {"allOf": [{"$ref": "#/$defs/d"}, B]}, "y": {"$ref": "#/$defs/d"}}, "$defs": {"d": A}},
     [f'{{"x":{BOTH},"y":{BOTH}}}'], ['{"z":1}']),
    ({"allOf": [{"properties": {"x": A}}, {"properties": {"x": B}}]}, [f'{{"x":{BOTH}}}'], []),
])  # fmt: skip
def test_objects_are_closed_where_that_excludes_nothing_else(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = compile_grammar(StructuredOutputs(json=schema), VOCABULARY)
    for text in good:
        jsonschema.validate(json.loads(text), schema)
    assert [text for text in good if not accepts(grammar, text, VOCABULARY)] == []
    assert [text for text in bad if accepts(grammar, text, VOCABULARY)] == []


def _kind(*texts: str, **more: Any) -> dict[str, Any]:
    kind = {"const": texts[0]} if len(texts) == 1 else {"enum": [*texts]}
    return {"type": "object", "properties": {"kind": kind}, "required": ["kind"], **more}


@pytest.mark.parametrize(
    ("alternatives", "known"),
    [
        ([_kind("cat"), _kind("dog")], True),
        ([_kind("cat", "lion"), _kind("dog")], True),
        ([_kind("cat", "dog"), _kind("dog")], False),
        ([_kind("cat"), _kind("dog", required=[])], False),
        ([_kind("cat"), {"properties": {"kind": {"const": "dog"}}, "required": ["kind"]}], False),
    ],
)
def test_references_of_a_oneof_are_told_apart_by_a_required_text(alternatives: list[Any], known: bool) -> None:
    schema = {
        "oneOf": [{"$ref": f"#/$defs/{i}"} for i in range(len(alternatives))],
        "$defs": {str(i): part for i, part in enumerate(alternatives)},
    }
    if known:
        assert '"oneOf"' not in json_schema_grammar(schema)
    else:
        with pytest.raises(InvalidRequest, match="oneOf"):
            json_schema_grammar(schema)
