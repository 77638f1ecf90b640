"""The keywords of JSON Schema (draft 2020-12) that Octavo enforces, as one table, and the check of a schema against it.

A keyword is enforced exactly, is an annotation that constrains nothing, or is refused by name wherever it stands; so is
a keyword with a value of the wrong kind. What the table accepts is decided here; turning it into a grammar is
grammar.py's and llguidance's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from octavo.core.errors import InvalidRequest

MAX_MULTIPLE = 1000
"""Largest multipleOf, counted in units of its last decimal: the automaton has a state for each remainder."""
MAX_EXPONENT = 18
"""Numbers of a schema lie within 10 to this power, and have as many decimals at most."""
MAX_COUNT = 100_000
"""Largest number that a length or count is limited to."""
MAX_REFS = 200
MAX_SCHEMAS = 1500
"""Schemas within a schema."""
MAX_PROPERTIES = 500
"""Named properties of one object."""
MAX_JSON_DEPTH = 100
MAX_JSON_VALUES = 10_000

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
DRAFTS = ("draft/2020-12", "draft/2019-09", "draft-07", "draft-06")

KEYWORDS: dict[str, tuple[str, str]] = {
    "type": ("types", f"one or more of {', '.join(TYPES)}"),
    "enum": ("values", "the value is one of these"),
    "const": ("value", "the value is this"),
    "anyOf": ("schemas", "at least one of the schemas"),
    "oneOf": ("schemas", "exactly one of the schemas, which must exclude each other visibly: by type or a constant"),
    "allOf": ("schemas", "all of the schemas"),
    "$ref": ("reference", "a place in the same schema: #, or # and a JSON pointer; recursion is allowed"),
    "$defs": ("named", "schemas to refer to"),
    "definitions": ("named", "the older name of $defs"),
    "$schema": ("draft", "names draft 2020-12, 2019-09, 07 or 06; the schema is read as 2020-12"),
    "properties": ("named", "values of named properties, written in this order; others: see below"),
    "required": ("names", "properties that are there"),
    "additionalProperties": ("schema", "values of all other properties"),
    "patternProperties": ("patterns", "values of properties by name; the patterns must exclude each other"),
    "minProperties": ("count", "at most one more than there are required properties, all named ones being required"),
    "maxProperties": ("count", "where all named properties are required"),
    "items": ("schema", "values of an array, after prefixItems"),
    "prefixItems": ("schemas", "the first values of an array"),
    "minItems": ("count", "length of an array"),
    "maxItems": ("count", "length of an array"),
    "minLength": ("count", "characters of a string"),
    "maxLength": ("count", "characters of a string"),
    "pattern": ("pattern", "a regular expression without look-around and back-references"),
    "format": ("format", f"one of {', '.join(FORMATS)}"),
    "minimum": ("number", "bound of a number"),
    "maximum": ("number", "bound of a number"),
    "exclusiveMinimum": ("number", "bound of a number"),
    "exclusiveMaximum": ("number", "bound of a number"),
    "multipleOf": ("multiple", f"exact in decimals; up to {MAX_MULTIPLE} units of its last decimal"),
}
"""Keyword -> (kind of its value, what is enforced)."""

ANNOTATIONS = (
    "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly",
    "contentEncoding", "contentMediaType", "contentSchema", "discriminator",
)  # fmt: skip
"""Keywords that say something about a value and constrain nothing; `discriminator` (OpenAPI's) tells readers of a oneOf
which property to look at."""


def refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs: {problem}", "structured_outputs")


def checked_schema(schema: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any] | bool]]:
    """A copy of `schema` with the enforced keywords alone, and all schemas in the copy by JSON pointer.

    Raises InvalidRequest that names what cannot be enforced.
    """
    check_json(schema)
    reader = _Reader()
    copy = reader.read(schema, "#")
    assert isinstance(copy, dict)
    for reference, at in reader.references:
        if reference not in reader.places:
            raise refused(f"$ref {reference!r} at {at} names no schema of this one")
    return copy, reader.places


def check_json(value: object) -> None:
    """Raises InvalidRequest for what is not JSON or too deep, without recursion."""
    level: list[object] = [value]
    seen = 0
    for _ in range(MAX_JSON_DEPTH):
        seen += len(level)
        if seen > MAX_JSON_VALUES:
            raise refused(f"the schema has more than {MAX_JSON_VALUES} values")
        below: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    raise refused("a name in the schema is not text")
                below += item.values()
                below += item.keys()
            elif isinstance(item, list | tuple):
                below += item
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, int | float):
                _check_finite(item)
            elif item is not None:
                raise refused(f"the schema holds {type(item).__name__}, which is not JSON")
        if not below:
            return
        level = below
    raise refused(f"the schema is nested more than {MAX_JSON_DEPTH} levels deep")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(f"unpaired surrogate in {text[:40]!r}") from None


def _check_finite(number: float) -> None:
    try:
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite:
        raise refused("the schema holds a number that is not finite")


class _Reader:
    """Copies a schema keyword by keyword; collects where schemas stand and what is referred to."""

    def __init__(self) -> None:
        self.places: dict[str, dict[str, Any] | bool] = {}
        self.references: list[tuple[str, str]] = []

    def read(self, schema: object, at: str) -> dict[str, Any] | bool:
        if len(self.places) == MAX_SCHEMAS:
            raise refused(f"the schema consists of more than {MAX_SCHEMAS} schemas")
        if isinstance(schema, bool):
            self.places[at] = schema
            return schema
        if not isinstance(schema, Mapping):
            raise refused(f"a schema is an object or a boolean, not {schema!r:.60} at {at}")
        copy: dict[str, Any] = {}
        self.places[at] = copy
        for name, value in schema.items():
            if name in ANNOTATIONS:
                continue
            if name not in KEYWORDS:
                raise refused(f"the keyword {name!r} at {at} is not supported")
            kind = KEYWORDS[name][0]
            found = getattr(self, f"_{kind}", None)
            if found is not None:
                copy[name] = found(value, name, f"{at}/{_escaped(name)}")
            elif not _CHECKS[kind](value):
                raise refused(f"{name} at {at} cannot be {value!r:.60}")
            elif kind != "draft":
                copy[name] = value
        if copy.get("minProperties", 0) > len(set(copy.get("required", ()))) + 1:
            raise refused(
                f"minProperties at {at} is {copy['minProperties']}, enforced only up to one more than there are "
                "required properties"
            )
        return copy

    def _schema(self, value: object, name: str, at: str) -> object:
        return self.read(value, at)

    def _schemas(self, value: object, name: str, at: str) -> list[object]:
        if not isinstance(value, list | tuple) or not value:
            raise refused(f"{name} at {at} must be a list of schemas")
        return [self.read(item, f"{at}/{i}") for i, item in enumerate(value)]

    def _named(self, value: object, name: str, at: str) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise refused(f"{name} at {at} must be an object of schemas")
        if len(value) > MAX_PROPERTIES:
            raise refused(f"{name} at {at} has {len(value)} entries, more than {MAX_PROPERTIES}")
        return {key: self.read(item, f"{at}/{_escaped(key)}") for key, item in value.items()}

    _patterns = _named

    def _reference(self, value: object, name: str, at: str) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise refused(f"$ref at {at} is {value!r:.60}; it must be '#' or begin with '#/'")
        self.references.append((value, at))
        if len(self.references) > MAX_REFS:
            raise refused(f"the schema has more than {MAX_REFS} uses of $ref")
        return value


def _escaped(name: str) -> str:
    """One step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _is_count(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value <= MAX_COUNT and value == int(value)


def _is_moderate(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= 10**MAX_EXPONENT and (value == 0 or abs(value) >= 10**-MAX_EXPONENT)


def _is_multiple(value: object) -> bool:
    if not isinstance(value, int | float) or not _is_moderate(value) or value <= 0:
        return False
    digits = Decimal(str(value)).normalize().as_tuple()
    assert isinstance(digits.exponent, int)
    units: int = int("".join(map(str, digits.digits))) * 10 ** max(digits.exponent, 0)
    return units <= MAX_MULTIPLE


def _are_types(value: object) -> bool:
    if isinstance(value, str):
        return value in TYPES
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) and v in TYPES for v in value)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_draft(value: object) -> bool:
    return isinstance(value, str) and any(draft in value for draft in DRAFTS)


_CHECKS: dict[str, Callable[[object], bool]] = {
    "types": _are_types,
    "values": lambda value: isinstance(value, list | tuple) and bool(value),
    "value": lambda value: True,
    "names": _are_names,
    "count": _is_count,
    "number": _is_moderate,
    "multiple": _is_multiple,
    "pattern": lambda value: isinstance(value, str),
    "format": lambda value: isinstance(value, str) and value in FORMATS,
    "draft": _is_draft,
}
