"""LangChain's ChatOpenAI: text, tools and structured output, sync and async."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.clients.conftest import Address
from tests.clients.scripted import ScriptedBackend, call, chosen


class City(BaseModel, extra="forbid"):
    """A city."""

    name: Literal["Paris", "Oslo"] = Field(description="Its name")
    population: int = Field(ge=1, le=99)


@tool
def get_weather(city: Literal["Paris", "Oslo"], days: int = 1) -> str:
    """The weather of a city."""
    return f"{days} days of rain in {city}"


@tool
def get_time(zone: str) -> str:
    """The time of a zone."""
    return f"noon in {zone}"


def chat_of(address: Address, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=address.base_url,
        api_key=SecretStr(address.key),
        model=address.model,
        max_retries=0,
        timeout=60,
        **{"temperature": 0.0} | options,
    )


@pytest.fixture(scope="session")
def chat(scripted: Address) -> ChatOpenAI:
    return chat_of(scripted)


@pytest.fixture(scope="session")
def model(real: Address) -> ChatOpenAI:
    """Of the embedded model, whose template knows no tools."""
    return chat_of(real, max_completion_tokens=80)


def test_invoke(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("fine, thanks")
    answer = chat.invoke([SystemMessage("be brief"), HumanMessage("how are you?")], stop=["END"])
    assert backend.prompt == "<system>be brief<user>how are you?<assistant>"
    assert answer.content == "fine, thanks"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == len(backend.prompt)
    assert answer.usage_metadata["output_tokens"] == len("fine, thanks") + 1
    assert backend.params[-1].stops == ("END",)


def test_stream_with_usage(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("one two three")
    whole: Any = AIMessageChunk(content="")
    pieces = 0
    for chunk in chat.stream("count", stream_usage=True):
        whole += chunk
        pieces += bool(chunk.content)
    assert whole.content == "one two three"
    assert pieces > 1
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 14


async def test_async(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("one", "two", "three", "three")
    assert (await chat.ainvoke("a")).content == "one"
    assert "".join([str(chunk.content) async for chunk in chat.astream("b")]) == "two"
    assert [answer.content for answer in await chat.abatch(["c", "d"])] == ["three", "three"]


def test_tools_are_called_and_their_results_read(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("Let me see." + call("get_weather", '{"city": "Paris", "days": 2}'), "It rains.")
    bound = chat.bind_tools([get_weather, get_time])
    question = HumanMessage("weather?")
    first = bound.invoke([question])
    assert "The weather of a city." in backend.prompt
    (made,) = first.tool_calls
    assert (made["name"], made["args"]) == ("get_weather", {"city": "Paris", "days": 2})
    assert made["id"]
    result = get_weather.invoke(made)
    assert isinstance(result, ToolMessage)
    assert bound.invoke([question, first, result]).content == "It rains."
    assert "<tool>2 days of rain in Paris" in backend.prompt
    assert '"name": "get_weather"' in backend.prompt


def test_tool_calls_stream(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say(call("get_weather", '{"city": "Oslo", "days": 3}') + call("get_time", '{"zone": "UTC"}'))
    whole: Any = None
    for chunk in chat.bind_tools([get_weather, get_time]).stream("weather?"):
        whole = chunk if whole is None else whole + chunk
    assert [(made["name"], made["args"]) for made in whole.tool_calls] == [
        ("get_weather", {"city": "Oslo", "days": 3}),
        ("get_time", {"zone": "UTC"}),
    ]


@pytest.mark.parametrize("choice", ["any", "required", "get_time", True])
def test_forced_calls(chat: ChatOpenAI, backend: ScriptedBackend, choice: Any) -> None:
    backend.say(chosen("get_time", '{"zone": "CET"}'))
    answer = chat.bind_tools([get_time], tool_choice=choice).invoke("now")
    assert isinstance(answer, AIMessage)
    assert [(made["name"], made["args"]) for made in answer.tool_calls] == [("get_time", {"zone": "CET"})]


def test_no_call_without_need(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("hello", "hello")
    for choice in ("auto", "none"):
        answer = chat.bind_tools([get_time], tool_choice=choice).invoke("hello")
        assert (answer.content, answer.tool_calls) == ("hello", [])


def test_a_forced_call_is_constrained(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False, strict=True)
    answer = bound.invoke("Weather?")
    (made,) = answer.tool_calls
    assert made["name"] == "get_weather"
    assert made["args"]["city"] in ("Paris", "Oslo")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    city = model.with_structured_output(City, method=method, strict=True).invoke("Name a city.")
    assert isinstance(city, City)


def test_structured_output_of_a_schema_with_the_raw_answer(model: ChatOpenAI) -> None:
    structured = model.with_structured_output(City.model_json_schema(), include_raw=True)
    answer = structured.invoke("Name a city.")
    assert isinstance(answer, dict)
    assert answer["parsing_error"] is None
    City.model_validate(answer["parsed"])
    assert answer["raw"].usage_metadata["output_tokens"] > 5


def test_structured_output_in_json_mode(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say('{"name": "Paris", "population": 2}')
    city = chat.with_structured_output(City, method="json_mode").invoke("Name a city, in JSON.")
    assert city == City(name="Paris", population=2)
    wanted = backend.params[-1].structured_outputs
    assert wanted is not None
    assert wanted.json_object


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the parsed object that LangChain attaches
async def test_structured_output_streams(model: ChatOpenAI) -> None:
    *_, last = [part async for part in model.with_structured_output(City).astream("Name a city.")]
    assert isinstance(last, City)


def test_logprobs(chat: ChatOpenAI, backend: ScriptedBackend) -> None:
    backend.say("ab")
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("x")
    assert [token["token"] for token in answer.response_metadata["logprobs"]["content"]] == ["a", "b"]


def test_vllms_fields_go_in_extra_body(scripted: Address, backend: ScriptedBackend) -> None:
    backend.say("x")
    chat_of(scripted, extra_body={"top_k": 3, "min_p": 0.25}).invoke("x")
    assert (backend.params[-1].top_k, backend.params[-1].min_p) == (3, 0.25)


def test_errors_are_the_clients(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat.invoke("x", top_p=7)
    assert caught.value.param == "top_p"
