"""What the tests of the official client say and read."""

from __future__ import annotations

import json
from typing import Any, cast

from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel


def user(text: str = "hello") -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def content_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def extra(model: BaseModel, field: str) -> str:
    """A field that the client's types do not know."""
    return cast("str", (model.model_extra or {}).get(field) or "")


def calls_of(message: Any) -> list[tuple[str, Any]]:
    """Name and arguments of each call."""
    return [(made.function.name, json.loads(made.function.arguments)) for made in message.tool_calls or []]


def tool(name: str, **properties: Any) -> ChatCompletionToolParam:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": parameters}}


WEATHER = tool("get_weather", city={"enum": ["Paris", "Oslo"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
CLOCK = tool("get_time", zone={"enum": ["UTC", "CET"]})
