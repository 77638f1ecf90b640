"""pydantic-ai: agents with tools, tool and native output, and streaming."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelHTTPError, ModelRetry, NativeOutput
from pydantic_ai.messages import ThinkingPart, ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.conftest import Address
from tests.clients.scripted import ScriptedBackend, call, chosen


class City(BaseModel):
    name: Literal["Paris", "Oslo"]
    population: int = Field(ge=1, le=99)


class Trip(BaseModel):
    start: City
    stops: list[City] = Field(max_length=1)


@asynccontextmanager
async def model_of(address: Address) -> AsyncIterator[OpenAIChatModel]:
    async with AsyncOpenAI(base_url=address.base_url, api_key=address.key, max_retries=0, timeout=60) as client:
        yield OpenAIChatModel(address.model, provider=OpenAIProvider(openai_client=client))


@pytest.fixture
async def chat(scripted: Address) -> AsyncIterator[OpenAIChatModel]:
    async with model_of(scripted) as model:
        yield model


@pytest.fixture
async def model(real: Address) -> AsyncIterator[OpenAIChatModel]:
    """The embedded one, whose template knows no tools."""
    async with model_of(real) as model:
        yield model


SETTINGS = ModelSettings(temperature=0, max_tokens=120)


async def test_text(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    backend.say("fine", "still fine")
    agent = Agent(chat, instructions="be brief")
    first = await agent.run("how are you?", model_settings=ModelSettings(temperature=0.5, seed=3))
    assert first.output == "fine"
    assert "<system>be brief" in backend.prompt
    assert (backend.params[-1].temperature, backend.params[-1].seed) == (0.5, 3)
    assert first.usage.output_tokens == 5
    second = await agent.run("and now?", message_history=first.all_messages())
    assert second.output == "still fine"
    assert "<user>how are you?<assistant>fine<user>and now?" in backend.prompt


async def test_text_streams(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    backend.say("one two three")
    async with Agent(chat).run_stream("count") as stream:
        parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(parts) == "one two three"
    assert len(parts) > 1


async def test_reasoning(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    backend.say("<think>well ...</think>yes")
    result = await Agent(chat).run("is it?")
    assert result.output == "yes"
    thoughts = [part.content for part in result.response.parts if isinstance(part, ThinkingPart)]
    assert [thought.strip() for thought in thoughts] == ["well ..."]


def weather_agent(chat: OpenAIChatModel, seen: list[tuple[str, int]]) -> Agent[None, str]:
    agent = Agent(chat)

    @agent.tool_plain
    def get_weather(city: str, days: int = 1) -> str:
        """The weather of a city."""
        seen.append((city, days))
        if city == "Atlantis":
            raise ModelRetry("there is no such city")
        return f"{days} days of rain in {city}"

    return agent


async def test_tools_are_called_with_arguments(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    seen: list[tuple[str, int]] = []
    backend.say(
        "Let me see." + call("get_weather", '{"city": "Paris", "days": 2}') + call("get_weather", '{"city": "Oslo"}'),
        "It rains.",
    )
    result = await weather_agent(chat, seen).run("weather?")
    assert result.output == "It rains."
    assert sorted(seen) == [("Oslo", 1), ("Paris", 2)]
    assert "2 days of rain in Paris" in backend.prompt
    assert "1 days of rain in Oslo" in backend.prompt


async def test_a_tool_asks_for_another_try(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    seen: list[tuple[str, int]] = []
    backend.say(
        call("get_weather", '{"city": "Atlantis"}'),
        call("get_weather", '{"town": "Paris"}'),
        call("get_weather", '{"city": "Paris"}'),
        "It rains.",
    )
    agent = weather_agent(chat, seen)
    result = await agent.run("weather?", retries=3)
    assert result.output == "It rains."
    assert seen == [("Atlantis", 1), ("Paris", 1)]


async def test_tools_stream(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    seen: list[tuple[str, int]] = []
    backend.say(call("get_weather", '{"city": "Oslo", "days": 3}'), "It rains.")
    async with weather_agent(chat, seen).run_stream("weather?") as stream:
        text = await stream.get_output()
    assert text == "It rains."
    assert seen == [("Oslo", 3)]


async def test_tool_output_is_forced_and_read(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    backend.say(chosen("final_result", '{"name": "Paris", "population": 2}'))
    result = await Agent(chat, output_type=City).run("which city?")
    assert result.output == City(name="Paris", population=2)
    assert any(isinstance(part, ToolCallPart) for message in result.all_messages() for part in message.parts)


async def test_an_output_function_may_ask_again(chat: OpenAIChatModel, backend: ScriptedBackend) -> None:
    backend.say(
        chosen("final_result", '{"name": "Paris", "population": 2}'),
        chosen("final_result", '{"name": "Oslo", "population": 1}'),
    )
    agent = Agent(chat, output_type=City)

    @agent.output_validator
    def northern(city: City) -> City:
        if city.name != "Oslo":
            raise ModelRetry("further north")
        return city

    assert (await agent.run("which city?")).output.name == "Oslo"
    assert "further north" in backend.prompt


@pytest.mark.parametrize("native", [False, True])
async def test_output_is_constrained(model: OpenAIChatModel, native: bool) -> None:
    agent = Agent(model, output_type=NativeOutput(Trip) if native else Trip, retries=0)
    result = await agent.run("Plan a trip.", model_settings=SETTINGS)
    assert isinstance(result.output, Trip)


async def test_native_output_streams(model: OpenAIChatModel) -> None:
    agent = Agent(model, output_type=NativeOutput(City), retries=0)
    async with agent.run_stream("Name a city.", model_settings=SETTINGS) as stream:
        async for _ in stream.stream_output(debounce_by=None):
            pass
        assert isinstance(await stream.get_output(), City)


async def test_errors_carry_the_servers_body(chat: OpenAIChatModel) -> None:
    with pytest.raises(ModelHTTPError) as caught:
        await Agent(chat).run("x", model_settings=ModelSettings(top_p=7))
    assert caught.value.status_code == 400
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == "top_p"
