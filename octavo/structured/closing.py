"""Which objects are closed: hold the properties that their schema names and no others, though JSON Schema allows more.

A model that may add properties does, until its tokens run out. An object that is closed satisfies the open schema too,
so nothing invalid comes of it. An object whose properties come from several schemas (allOf, or $ref, anyOf or required
beside properties) stays open, as does all within it: each schema alone would exclude the properties of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_OBJECT = frozenset(("properties", "required", "minProperties", "patternProperties", "additionalProperties"))
_WITHIN = {
    "properties": True, "patternProperties": True, "prefixItems": False, "allOf": False, "anyOf": False, "oneOf": False
}  # fmt: skip
"""Keyword -> whether its schemas have names; additionalProperties and items have one schema."""


def close_objects(places: Mapping[str, dict[str, Any] | bool]) -> None:
    """Closes objects of a checked schema. `places` are all schemas in it by JSON pointer; they change in place."""
    schemas = [schema for schema in places.values() if isinstance(schema, dict)]
    shared = _with_all_below((schema for schema in schemas if _sources(schema) > 1), places)
    for schema in schemas:
        if id(schema) not in shared and _is_closable(schema):
            schema["additionalProperties"] = False


def _sources(schema: Mapping[str, Any]) -> int:
    """How many schemas say what the properties of one object are."""
    beside = sum(name in schema for name in ("anyOf", "oneOf", "$ref", "const", "enum"))
    return beside + len(schema.get("allOf", ())) + (not _OBJECT.isdisjoint(schema))


def _is_closable(schema: Mapping[str, Any]) -> bool:
    names = schema.get("properties")
    if names is None or "additionalProperties" in schema or "patternProperties" in schema:
        return False
    return bool(names.keys() >= set(schema.get("required", ())) and len(names) >= schema.get("minProperties", 0))


def _with_all_below(schemas: Iterable[dict[str, Any]], places: Mapping[str, dict[str, Any] | bool]) -> set[int]:
    """Identities of `schemas`, of the schemas within them and of those that they refer to."""
    found: set[int] = set()
    left: list[Any] = [*schemas]
    while left:
        schema = left.pop()
        if not isinstance(schema, dict) or id(schema) in found:
            continue
        found.add(id(schema))
        left += [schema.get("items"), schema.get("additionalProperties"), places.get(schema.get("$ref", ""))]
        for keyword, named in _WITHIN.items():
            within = schema.get(keyword, ())
            left += within.values() if named and within else within
    return found
