"""The official client when something is wrong: with the request, with the engine, or it leaves."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.conftest import Address, client_of
from tests.clients.scripted import ScriptedBackend
from tests.clients.shared import CLOCK, user


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 10**7}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "none"}}},
            "tool_choice",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"extra_body": {"tempratur": 1}}, "tempratur"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
    ],
)
def test_bad_requests_name_the_field(client: OpenAI, name: str, given: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": name, "messages": user()} | given)
    error = caught.value
    assert error.status_code == 400
    assert error.param is not None
    assert error.param == param or error.param.startswith(f"{param}.") or error.param.startswith(f"{param}[")
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "schema", [{"not": {"type": "string"}}, {"$ref": "#/$defs/None"}, {"type": "array", "contains": {}}]
)
def test_keywords_that_are_not_enforced_are_refused(client: OpenAI, name: str, schema: dict[str, Any]) -> None:
    keyword = next(word for word in ("not", "$ref", "contains") if word in schema)
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=user(), response_format=wanted)
    assert keyword in caught.value.message
    assert (caught.value.param or "").startswith("response_format")


def test_a_wrong_key_and_a_wrong_model(client: OpenAI, scripted: Address) -> None:
    with client_of(scripted, "wrong") as other, pytest.raises(openai.AuthenticationError) as refused:
        other.models.list()
    assert refused.value.status_code == 401
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=user())
    assert missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="none", input="x")


def test_errors_of_the_engine(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("FAIL", "FAIL", "on")
    with pytest.raises(openai.InternalServerError, match="kernel panic"):
        client.chat.completions.create(model=name, messages=user())
    stream = client.chat.completions.create(model=name, messages=user(), stream=True)
    with pytest.raises(openai.APIError, match="kernel panic"):
        list(stream)
    assert client.chat.completions.create(model=name, messages=user()).choices[0].message.content == "on"


def test_a_timeout_ends_the_request(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("HANG")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=name, messages=user())
    assert backend.idle.wait(10)


def test_leaving_a_stream_ends_the_request(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("HANG")
    with client.chat.completions.create(model=name, messages=user(), stream=True) as stream:
        next(iter(stream))
        assert not backend.idle.is_set()
    assert backend.idle.wait(10)


async def test_leaving_a_stream_ends_the_request_async(
    aclient: AsyncOpenAI, backend: ScriptedBackend, name: str
) -> None:
    backend.say("HANG")
    stream = await aclient.chat.completions.create(model=name, messages=user(), stream=True)
    async for _ in stream:
        break
    await stream.close()
    assert backend.idle.wait(10)
