"""The OpenAPI 3.1 description of the server, made from the tables of request fields and the response shapes.

`ROUTES` is the list of what the server answers; a test compares it with the app's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.server import wire
from octavo.server.errors import ErrorBody
from octavo.server.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from octavo.server.table import Field, Kind, field_table

_REF = "#/components/schemas/{name}"


@dataclass(frozen=True)
class RouteFacts:
    """What a route is for, takes and answers."""

    path: str
    method: str
    summary: str
    request: Kind | None = None
    response: Kind | None = None
    media: str = "application/json"
    statuses: Sequence[int] = ()
    """Of errors, beside 401."""
    open: bool = False
    """Asks for no key."""

    @property
    def streams(self) -> bool:
        return self.request is not None and "stream" in field_table(self.request)


_BODY = (400, 404, 413, 500, 503)

ROUTES = (
    RouteFacts("/v1/models", "get", "The names that requests may use.", response=wire.ModelList),
    RouteFacts("/v1/models/{model}", "get", "One of them.", response=wire.ModelCard, statuses=(404,)),
    RouteFacts(
        "/v1/chat/completions", "post", "An assistant's message.", ChatRequest, wire.ChatCompletion, statuses=_BODY
    ),
    RouteFacts(
        "/v1/completions", "post", "The continuation of text.", CompletionRequest, wire.Completion, statuses=_BODY
    ),
    RouteFacts("/tokenize", "post", "Text to token ids.", TokenizeRequest, wire.Tokenized, statuses=_BODY),
    RouteFacts("/detokenize", "post", "Token ids to text.", DetokenizeRequest, wire.Detokenized, statuses=_BODY),
    RouteFacts("/health", "get", "200 while the engine serves.", media="", statuses=(503,), open=True),
    RouteFacts("/version", "get", "Octavo's version.", response=wire.Version),
    RouteFacts("/metrics", "get", "Counters and histograms for Prometheus.", media="text/plain"),
    RouteFacts("/openapi.json", "get", "This description."),
)


def describe(version: str) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    responses = [route.response for route in ROUTES if route.response is not None]
    _, shapes = msgspec.json.schema_components([*responses, wire.ChatChunk, ErrorBody], ref_template=_REF)
    requests = {kind.__name__: _object(kind) for kind in request_kinds()}
    assert not requests.keys() & shapes.keys(), "a request and a response have one name"
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": version, "description": "The OpenAI API, served by Octavo."},
        "paths": paths,
        "components": {
            "schemas": {**requests, **shapes},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def request_kinds() -> Iterator[Kind]:
    """Every class that a part of a body has the form of, each before those within it."""
    waiting = [route.request for route in ROUTES if route.request is not None]
    seen: set[Kind] = set()
    while waiting:
        kind = waiting.pop(0)
        if kind not in seen:
            seen.add(kind)
            yield kind
            for field in field_table(kind).values():
                waiting += field.forms


def _operation(route: RouteFacts) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary, "responses": {"200": _answer(route)}}
    error = {"description": "The error object.", "content": _json(ErrorBody)}
    for status in route.statuses if route.open else (401, *route.statuses):
        operation["responses"][str(status)] = error
    if "{" in route.path:
        name = route.path.partition("{")[2].rstrip("}")
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": _json(route.request)}
    operation["security"] = [] if route.open else [{}, {"key": []}]
    return operation


def _answer(route: RouteFacts) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.response is not None:
        content = _json(route.response)
    elif route.media:
        content = {route.media: {}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": "The answer.", "content": content} if content else {"description": "No content."}


def _json(kind: Kind) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(kind)}}


def _reference(kind: Kind) -> dict[str, Any]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _object(kind: Kind) -> dict[str, Any]:
    table = field_table(kind)
    return {
        "type": "object",
        "properties": {field.name: _property(field) for field in table.values()},
        "required": [field.name for field in table.values() if field.required],
        "additionalProperties": False,
    }


def _property(field: Field) -> dict[str, Any]:
    if field.use == "unbuilt":
        return {"enum": [None, *field.neutral], "description": f"Not supported: {field.instead}."}
    schema = value_schema(field)
    if not field.required:
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema | {"description": "Accepted; it changes no result."} if field.use == "inert" else schema


def value_schema(field: Field) -> dict[str, Any]:
    """Of the values that a field may have; null apart."""
    if field.spelled is not None:
        return dict(field.spelled.schema)
    schema = msgspec.json.schema(field.type)
    options = [option for option in schema.get("anyOf", [schema]) if option != {"type": "null"}]
    if field.form is not None:
        options = [_formed(option, field.form) for option in options]
    if field.bounds is not None:
        low, high, open_low = field.bounds
        options = [option | {"exclusiveMinimum" if open_low else "minimum": low, "maximum": high} for option in options]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _formed(option: dict[str, Any], form: Kind) -> dict[str, Any]:
    """`option` with what its Raws, of which msgspec says nothing, have the form of."""
    if option == {}:
        return _reference(form)
    return option | {"items": _reference(form)} if option.get("items") == {} else option
