"""Tools of a chat request: which the model may call, which it must, and the schema that holds it to them.

A required or named choice is answered with a JSON list of {"name": ..., "parameters": {...}}, whatever format the model
was trained on: a grammar enforces the tools' schemas, and `text.parsing` reads it back. With "auto" the model is free,
and its own format is read. Does not know prompts or answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from octavo.core.errors import InvalidRequest
from octavo.server.errors import rename
from octavo.server.fields import (
    AllowedTools,
    AllowedToolsChoice,
    ChatRequest,
    FunctionName,
    FunctionSpec,
    NamedToolChoice,
    Tool,
)
from octavo.server.table import decode, parse

MAX_TOOLS = 1024
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICE = msgspec.json.Decoder(Literal["none", "auto", "required"])
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Parameters of a function that is declared without."""
_LITERAL = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose values are data, not schemas."""

Choice = Literal["auto", "required", "named"]


class _Typed(msgspec.Struct):
    type: str


_TYPED = msgspec.json.Decoder(_Typed)


@dataclass(frozen=True)
class Tools:
    """What the model may call: at least one function."""

    functions: Sequence[Mapping[str, Any]]
    """name, description where given, and parameters of each."""
    positions: Sequence[int]
    """Where each stands in the request's `tools`."""
    choice: Choice
    single: bool
    """At most one call."""

    @property
    def told(self) -> list[dict[str, Any]]:
        """The tools as chat templates want them."""
        return [{"type": "function", "function": dict(function)} for function in self.functions]

    @property
    def constrained(self) -> bool:
        return self.choice != "auto"

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the answer to a constrained choice.

        A tool's parameters are a document of their own, so what their references point to moves with them.
        """
        calls, definitions = [], {}
        for i, function in enumerate(self.functions):
            definitions[f"tool{i}"] = _moved(_parameters(function), f"#/$defs/tool{i}")
            parts = {"name": {"const": function["name"]}, "parameters": {"$ref": f"#/$defs/tool{i}"}}
            calls.append({"type": "object", "properties": parts, "required": [*parts], "additionalProperties": False})
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        schema = {"type": "array", "items": items, "minItems": 1, "$defs": definitions}
        return schema | {"maxItems": 1} if self.single else schema

    def check(self) -> None:
        """Raises InvalidRequest that names the tool whose parameters cannot be enforced."""
        from octavo.structured import MAX_BYTES, json_schema_grammar

        size = sum(len(str(function["parameters"])) for function in self.functions)
        if size > MAX_BYTES:
            raise InvalidRequest(
                f"the parameters of the tools have {size} characters, more than the {MAX_BYTES} that a required choice "
                "can enforce: send fewer or shorter ones",
                "tools",
            )
        for position, function in zip(self.positions, self.functions, strict=True):
            try:
                json_schema_grammar(_parameters(function))
            except InvalidRequest as error:
                raise rename(error, {"structured_outputs": f"tools[{position}].function.parameters"}) from None

    @property
    def param(self) -> str:
        """The field at fault when all together cannot be enforced."""
        return f"tools[{self.positions[0]}].function.parameters" if len(self.positions) == 1 else "tools"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are an object even where the schema does not say so."""
    return {"type": "object", **function["parameters"]}


def _moved(schema: Any, root: str) -> Any:
    """`schema` with references into itself that fit its new place, the JSON pointer `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: value if key in _LITERAL else _moved_value(key, value, root) for key, value in schema.items()}


def _moved_value(key: str, value: Any, root: str) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return root + value[1:]
    return _moved(value, root)


def request_tools(request: ChatRequest) -> Tools | None:
    """What `request` lets the model call, None for nothing. Raises InvalidRequest."""
    functions = _functions(request.tools or ())
    choice, names = _choice(request, [function["name"] for function in functions])
    if choice == "none":
        return None
    chosen = [i for i, function in enumerate(functions) if function["name"] in names]
    single = choice == "named" or request.parallel_tool_calls is False
    return Tools([functions[i] for i in chosen], chosen, choice, single)


def _functions(tools: Sequence[msgspec.Raw]) -> list[dict[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools are more than {MAX_TOOLS}: send fewer", "tools")
    functions: dict[str, dict[str, Any]] = {}
    for i, raw in enumerate(tools):
        where = f"tools[{i}].function"
        tool = parse(Tool, raw, f"tools[{i}].")
        function = parse(FunctionSpec, tool.function, f"{where}.")
        name = function.name
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{where}.name is {name[:100]!r}: it must have 1 to 64 of the characters a-z, A-Z, 0-9, _ and -",
                f"{where}.name",
            )
        if name in functions:
            raise InvalidRequest(f"{where}.name is {name!r}, as another tool's: rename one", f"{where}.name")
        parameters = _NOTHING if function.parameters is None else function.parameters
        if (kind := parameters.get("type", "object")) != "object":
            raise InvalidRequest(
                f"{where}.parameters describe {kind!r:.100}: arguments are an object", f"{where}.parameters"
            )
        given = {"name": name, "description": function.description, "parameters": parameters}
        functions[name] = {key: value for key, value in given.items() if value is not None}
    return list(functions.values())


def _choice(request: ChatRequest, names: list[str]) -> tuple[Choice | Literal["none"], list[str]]:
    """The kind of choice, and the names of the functions to choose from."""
    raw = request.tool_choice
    if raw is None:
        return ("auto" if names else "none"), names
    if bytes(raw).startswith(b"{"):
        if not names:
            raise InvalidRequest("tool_choice names a tool without tools: give some", "tool_choice")
        return _chosen(raw, names)
    choice = decode(_CHOICE, raw, "tool_choice")
    if choice != "none" and not names:
        raise InvalidRequest(f"tool_choice is {choice!r} without tools: give some", "tool_choice")
    return choice, names


def _chosen(raw: msgspec.Raw, names: list[str]) -> tuple[Choice, list[str]]:
    """A choice that names functions."""
    kind = decode(_TYPED, raw, "tool_choice").type
    if kind == "allowed_tools":
        where = "tool_choice.allowed_tools"
        allowed = parse(AllowedTools, parse(AllowedToolsChoice, raw, "tool_choice.").allowed_tools, f"{where}.")
        if not allowed.tools:
            raise InvalidRequest(f"{where}.tools is empty: name at least one", f"{where}.tools")
        return allowed.mode, [_named(tool, f"{where}.tools[{i}].", names) for i, tool in enumerate(allowed.tools)]
    return "named", [_named(raw, "tool_choice.", names)]


def _named(raw: msgspec.Raw, prefix: str, names: list[str]) -> str:
    choice = parse(NamedToolChoice, raw, prefix)
    name = parse(FunctionName, choice.function, f"{prefix}function.").name
    if name not in names:
        where = f"{prefix}function.name"
        raise InvalidRequest(f"{where} is {name[:100]!r}, which is none of tools", where)
    return name
