"""The tools of a request as the parsers need them: names, and the types that parameters have.

Owns the conversion of a parameter's plain text to JSON by its schema. Does not validate: what does not fit stays text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from octavo.text.parsing.json_text import NUMBER, is_json

TEXT = frozenset({"string"})
_DEPTH = 8
_JSON_TYPES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
_WORDS = {"boolean": ("true", "false"), "null": ("null", "none")}


def escaped(text: str) -> str:
    """`text` as the inside of a JSON string."""
    return encode_basestring(text)[1:-1]


class Tools:
    """Tools as in OpenAI's requests: {"type": "function", "function": {"name", "parameters"}}; others are ignored."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
        self._schemas: dict[str, Any] = {
            function["name"]: function.get("parameters")
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }

    def has(self, name: str) -> bool:
        """True for a tool of the request."""
        return name in self._schemas

    def any_name(self, name: str) -> bool:
        """True for what a model that writes explicit markers may call: the client learns of unknown names."""
        return bool(name)

    def known(self, name: str) -> bool:
        """True for a tool of the request (for any name if it has none): where only this tells a call from prose."""
        return name in self._schemas or not self._schemas

    def types(self, name: str, parameter: str) -> frozenset[str]:
        """The JSON types that the parameter may have; empty: any."""
        schema = self._schemas.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return _types(properties.get(parameter) if isinstance(properties, Mapping) else None, schema, _DEPTH)


def _types(schema: object, root: object, depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, Sequence):
        return frozenset(item for item in kind if isinstance(item, str))
    if "const" in schema:
        return frozenset({_JSON_TYPES.get(type(schema["const"]), "")})
    if isinstance(schema.get("enum"), Sequence):
        return frozenset(_JSON_TYPES.get(type(value), "") for value in schema["enum"])
    if isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, depth - 1)
    for word in ("anyOf", "oneOf"):
        branches = schema.get(word)
        if isinstance(branches, Sequence):
            found = [_types(branch, root, depth - 1) for branch in branches[:64]]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()


def _resolve(reference: str, root: object) -> object:
    """The schema at a local JSON pointer, None if there is none."""
    schema = root
    for key in reference.removeprefix("#").split("/")[1:]:
        schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema


def to_json(text: str, types: frozenset[str]) -> str:
    """A parameter's text as JSON of one of `types` (empty: any); a JSON string if it is of none of them."""
    value = text.strip()
    if not types:
        return value if is_json(value) and value[:1] != '"' else json.dumps(text, ensure_ascii=False)
    for kind, words in _WORDS.items():
        if kind in types and value.lower() in words:
            return "null" if kind == "null" else value.lower()
    if types & {"integer", "number"} and NUMBER.fullmatch(value):
        return value
    opening = {"object": "{", "array": "["}
    if any(kind in types and value.startswith(opening[kind]) for kind in opening) and is_json(value):
        return value
    return json.dumps(text, ensure_ascii=False)
