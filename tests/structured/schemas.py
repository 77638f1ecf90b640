"""Schemas over every keyword of the table, and texts that random choices under their masks make."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from octavo.structured import Vocabulary
from octavo.structured.grammar import new_matcher
from octavo.structured.keywords import FORMATS
from tests.frontend.tiny import EOS, VOCAB, byte_tokenizer

Schema = dict[str, Any]


def byte_vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer(), VOCAB, (EOS,))


def leaves() -> list[Schema]:
    """Schemas of values without parts."""
    numbers: list[Schema] = [
        {"type": "integer"},
        {"type": "number"},
        {"type": "integer", "minimum": -5, "maximum": 12},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000},
        {"type": "number", "minimum": 0.5, "exclusiveMaximum": 3.25},
        {"type": "number", "minimum": -273.15, "maximum": 1e6},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
        {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
    ]
    strings: list[Schema] = [
        {"type": "string", "maxLength": 8},
        {"type": "string", "minLength": 2, "maxLength": 4},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        {"type": "string", "pattern": "^(red|green|blue)$"},
        {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 6},
        *({"type": "string", "format": name, "maxLength": 60} for name in FORMATS if name not in ("uri", "email")),
        {"type": "string", "format": "email", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.org$"},
        {"type": "string", "format": "uri", "pattern": "^https://[a-z]{1,8}\\.org/$"},
    ]
    plain: list[Schema] = [
        {"type": "null"},
        {"type": "boolean"},
        {"type": ["boolean", "null"]},
        {"const": 'fixed é"\\\n'},
        {"const": {"a": [1, None]}},
        {"enum": ["x", 1, 2.5, None, True, [1], {"k": "v"}]},
        {"enum": [f"option {i}" for i in range(30)]},
        {"type": "string", "enum": ["a", "b"], "title": "T", "description": "D", "default": "a", "examples": ["a"]},
        {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"const": "none"}]},
        {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}], "$comment": "merged"},
        {"type": "integer", "minimum": 0, "maximum": 5, "deprecated": True, "readOnly": True, "writeOnly": False},
    ]
    return numbers + strings + plain


def closed(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def wrapped(leaf: Schema, i: int) -> list[Schema]:
    """The ways in which a value can be part of another."""
    return [
        closed(id={"type": "integer", "minimum": 0, "maximum": 99}, value=leaf),
        {"type": "object", "properties": {"v": leaf, "w": {"type": "null"}}, "additionalProperties": False},
        {"type": "array", "items": leaf, "minItems": 1 + i % 2, "maxItems": 2},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"l": leaf}}
        | closed(a={"$ref": "#/$defs/l"}),
        {"type": "array", "prefixItems": [{"const": i}, leaf], "items": False, "minItems": 2},
        {"type": "object", "patternProperties": {f"^p{i}[a-z]{{1,3}}$": leaf}, "maxProperties": 2,
         "additionalProperties": False},
        {"type": "object", "additionalProperties": leaf, "minProperties": 1, "maxProperties": 1},
    ]  # fmt: skip


def composed() -> list[Schema]:
    node = closed(v={"type": "boolean"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    shape = [closed(kind={"const": kind}, size={"enum": [1, 2]}) for kind in ("circle", "square")]
    return [
        {"$defs": {"node": node}, "$ref": "#/$defs/node"},
        {"definitions": {"n": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/definitions/n"}, "maxItems": 2},
        {"oneOf": shape},
        closed(shape={"anyOf": shape}),
        {"allOf": [closed(a={"type": "null"}) | {"additionalProperties": True}, {"required": ["b"]},
                   {"properties": {"b": {"enum": [1]}}, "maxProperties": 2}]},
        closed(**{f"k{i}": {"type": "boolean"} for i in range(20)}),
    ]  # fmt: skip


def schemas() -> list[Schema]:
    """More than 200, each of them satisfiable by short texts."""
    found = leaves()
    return found + [one for i, leaf in enumerate(found) for one in wrapped(leaf, i)] + composed()


def allowed(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return [int(i) for i in np.nonzero(bits)[0]]


def accepts(grammar: str, text: str, vocabulary: Vocabulary) -> bool:
    """Whether the text is allowed token by token, and the end after it."""
    matcher = new_matcher(grammar, vocabulary)
    for token in text.encode():
        if token not in allowed(matcher.compute_bitmask()):
            return False
        assert matcher.consume_token(token)
    return EOS in allowed(matcher.compute_bitmask())


def random_text(grammar: str, vocabulary: Vocabulary, seed: int, steps: int = 400) -> bytes:
    """A text of single bytes that the grammar allows, closing what can be closed."""
    chosen = random.Random(seed)
    matcher = new_matcher(grammar, vocabulary)
    text = bytearray()
    for step in range(steps):
        ids = allowed(matcher.compute_bitmask())
        assert ids, matcher.get_error()
        if EOS in ids and (ids == [EOS] or chosen.random() < 0.6):
            return bytes(text)
        ids = [i for i in ids if i != EOS]
        closing = [i for i in ids if i in b'"}],']
        visible = [i for i in ids if 32 < i < 127] or ids
        token = chosen.choice(closing if closing and chosen.random() < 0.4 + step / steps else visible)
        assert matcher.consume_token(token), matcher.get_error()
        text.append(token)
    raise AssertionError(f"no end after {bytes(text)!r}")
