"""The official client, sync and async: models, tokens, and answers as bytes."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.scripted import ScriptedBackend
from tests.clients.shared import content_of, user


def test_models(client: OpenAI, name: str) -> None:
    assert [card.id for card in client.models.list()] == [name]
    assert client.models.retrieve(name).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert "none" in caught.value.message


async def test_models_async(aclient: AsyncOpenAI, name: str) -> None:
    assert [card.id async for card in aclient.models.list()] == [name]


def test_raw_and_streaming_responses(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("raw", "raw", "raw")
    response = client.chat.completions.with_raw_response.create(model=name, messages=user())
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/json")
    assert response.parse().choices[0].message.content == "raw"
    with client.chat.completions.with_streaming_response.create(model=name, messages=user()) as streamed:
        assert json.loads(streamed.read())["object"] == "chat.completion"
    events = client.chat.completions.with_raw_response.create(model=name, messages=user(), stream=True)
    assert events.headers["content-type"].startswith("text/event-stream")
    assert content_of([*events.parse()]) == "raw"


def test_tokenize_and_detokenize(client: OpenAI, name: str) -> None:
    root = client.with_options(base_url=str(client.base_url).removesuffix("/v1/"))
    told: Any = root.post("/tokenize", cast_to=object, body={"model": name, "prompt": "hello"})
    assert told["tokens"] == [*b"hello"]
    back: Any = root.post("/detokenize", cast_to=object, body={"model": name, "tokens": told["tokens"]})
    assert back["prompt"] == "hello"
