"""What may be made of a schema so that a grammar can follow it: objects closed, alternatives told apart.

Closed objects hold the properties that their schema names and no others, though JSON Schema allows more.

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


def tell_apart(places: Mapping[str, dict[str, Any] | bool]) -> None:
    """Makes anyOf of a oneOf whose alternatives are objects that each require another text of the same property.

    At most one of them can hold then. The compiler sees that by itself only where none of them is a reference.
    """
    for schema in places.values():
        if isinstance(schema, dict) and "oneOf" in schema and "anyOf" not in schema:
            alternatives = [_resolved(part, places) for part in schema["oneOf"]]
            if _exclude_each_other(alternatives, places):
                schema["anyOf"] = schema.pop("oneOf")


def _resolved(schema: Any, places: Mapping[str, dict[str, Any] | bool]) -> Any:
    """What `schema` refers to, when it does nothing else."""
    for _ in places:
        if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
            break
        schema = places.get(schema["$ref"])
    return schema


def _exclude_each_other(alternatives: list[Any], places: Mapping[str, dict[str, Any] | bool]) -> bool:
    if not alternatives or not all(isinstance(part, dict) and part.get("type") == "object" for part in alternatives):
        return False
    required = [set(part.get("required", ())) & part.get("properties", {}).keys() for part in alternatives]
    shared = set.intersection(*required)
    return any(_differ([_resolved(part["properties"][name], places) for part in alternatives]) for name in shared)


def _differ(schemas: list[Any]) -> bool:
    """Whether each allows texts of a list only, and no two the same."""
    texts: list[Any] = []
    for schema in schemas:
        if not isinstance(schema, dict) or not ("const" in schema or "enum" in schema):
            return False
        texts += [schema["const"]] if "const" in schema else schema["enum"]
    return all(isinstance(text, str) for text in texts) and len(set(texts)) == len(texts)


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
