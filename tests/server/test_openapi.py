"""The OpenAPI description: it is the app's, it is valid, and nothing made from it breaks the server."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from octavo.server import create_app
from octavo.server.openapi import ROUTES, describe, request_kinds
from octavo.server.table import field_table
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS

ROOT = Path(__file__).parents[2]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
APP = create_app(EchoBackend(max_model_len=256), SETTINGS)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


@SCHEMA.parametrize()
@hypothesis.settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck), database=None
)
def test_nothing_from_the_description_breaks_the_server(case: schemathesis.Case[Any]) -> None:
    if isinstance(case.body, dict):
        case.body.pop("model", None)  # or most answers are that there is none of this name
    case.call_and_validate(checks=CHECKS)


def test_the_routes_are_the_apps() -> None:
    described = {(route.path.replace("{model}", "{model:path}"), route.method.upper()) for route in ROUTES}
    served = {(r.path, m) for r in APP.routes if isinstance(r, Route) for m in (r.methods or set()) - {"HEAD"}}
    assert described == served


async def test_it_is_served(http: httpx.AsyncClient) -> None:
    answer = await http.get("/openapi.json")
    assert answer.json()["openapi"] == "3.1.0"
    assert answer.headers["content-type"] == "application/json"


def test_every_schema_is_valid_and_every_reference_leads_somewhere() -> None:
    document = describe("0")
    schemas = document["components"]["schemas"]
    left: list[Any] = [document]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.values()
            if isinstance(item.get("$ref"), str):
                assert item["$ref"].rpartition("/")[2] in schemas
        elif isinstance(item, list):
            left += item
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_field_is_described() -> None:
    schemas = describe("0")["components"]["schemas"]
    for kind in request_kinds():
        assert schemas[kind.__name__]["properties"].keys() == field_table(kind).keys()
        assert schemas[kind.__name__]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "temperature": 0.5, "priority": 0}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tool_choice": "none"}, True),
        ({"messages": [], "top_logprobs": 5, "stop": ["a"], "seed": None, "guided_json": None}, True),
        (
            {"messages": [], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
            True,
        ),
        ({}, False),
        ({"messages": [{}]}, False),
        ({"messages": [], "top_p": 0}, False),
        ({"messages": [], "top_logprobs": 21}, False),
        ({"messages": [], "priority": 1}, False),
        ({"messages": [], "other": 1}, False),
        ({"messages": [], "tool_choice": {"type": "function"}}, False),
        ({"messages": [], "logprobs": 5}, False),
    ],
)
def test_what_it_says_of_a_chat_request(body: dict[str, Any], valid: bool) -> None:
    document = describe("0")
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is valid


def test_the_documentation_is_the_tables() -> None:
    document = runpy.run_path(str(ROOT / "tools" / "api_table.py"))["document"]()
    assert (ROOT / "docs" / "api.md").read_text() == document, "run: python tools/api_table.py > docs/api.md"
    for kind in request_kinds():
        for name in field_table(kind):
            assert f"`{name}`" in document
