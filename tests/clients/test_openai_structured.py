"""The official client's constrained answers of the embedded model: forced calls, JSON, grammars.

Its template knows no tools.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.conftest import Address
from tests.clients.shared import CLOCK, WEATHER, calls_of, content_of, user


class City(BaseModel, extra="forbid"):
    name: Literal["Paris", "Oslo"]
    population: int = Field(ge=1, le=99)


class Trip(BaseModel, extra="forbid"):
    """Nested, with a list of bounded length."""

    stops: list[City] = Field(min_length=1, max_length=2)
    by_train: bool


def test_a_required_choice_is_constrained(model: OpenAI, real: Address) -> None:
    done = model.chat.completions.create(
        model=real.model,
        messages=user("What is the weather in Paris?"),
        tools=[WEATHER, CLOCK],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    )
    (choice,) = done.choices
    ((called, arguments),) = calls_of(choice.message)
    check_arguments(called, arguments)


def check_arguments(called: str, arguments: dict[str, Any]) -> None:
    """They follow the schema of the tool."""
    if called == "get_weather":
        assert arguments["city"] in ("Paris", "Oslo")
        assert arguments["days"] in range(1, 10)
    else:
        assert called == "get_time"
        assert arguments["zone"] in ("UTC", "CET")


def test_a_named_choice_is_constrained_and_streams(model: OpenAI, real: Address) -> None:
    names, arguments, reasons = [], "", set()
    for chunk in model.chat.completions.create(
        model=real.model,
        messages=user("What time is it?"),
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        temperature=0,
        max_tokens=60,
        stream=True,
    ):
        for part in chunk.choices:
            reasons.add(part.finish_reason)
            for delta in part.delta.tool_calls or []:
                assert delta.function is not None
                names += [delta.function.name] if delta.function.name else []
                arguments += delta.function.arguments or ""
    assert names == ["get_time"]
    check_arguments("get_time", json.loads(arguments))
    assert reasons - {None} <= {"tool_calls", "stop"}


def test_json_object(model: OpenAI, real: Address) -> None:
    (choice,) = model.chat.completions.create(
        model=real.model,
        messages=user('Answer with the JSON object {"a": 1}'),
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=64,
    ).choices
    text = choice.message.content or ""
    assert text.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_json_schema_streams(model: OpenAI, real: Address) -> None:
    stream = model.chat.completions.create(
        model=real.model,
        messages=user("Name a city."),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "City", "strict": True, "schema": City.model_json_schema()},
        },
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    City.model_validate_json(content_of([*stream]))


def test_parse_with_a_pydantic_model(model: OpenAI, real: Address) -> None:
    done = model.chat.completions.parse(
        model=real.model, messages=user("Plan a trip."), response_format=Trip, temperature=0, max_tokens=128
    )
    parsed = done.choices[0].message.parsed
    assert isinstance(parsed, Trip)
    assert 1 <= len(parsed.stops) <= 2


def test_parse_tools_with_a_pydantic_model(model: OpenAI, real: Address) -> None:
    done = model.chat.completions.parse(
        model=real.model,
        messages=user("Name a city."),
        tools=[openai.pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    )
    (made,) = done.choices[0].message.tool_calls or []
    assert isinstance(made.function.parsed_arguments, City)


async def test_parse_async(real: Address) -> None:
    async with AsyncOpenAI(base_url=real.base_url, api_key=real.key, max_retries=0, timeout=60) as client:
        done = await client.chat.completions.parse(
            model=real.model, messages=user("Name a city."), response_format=City, temperature=0, max_tokens=64
        )
        assert isinstance(done.choices[0].message.parsed, City)
        async with client.chat.completions.stream(
            model=real.model, messages=user("Name a city."), response_format=City, temperature=0, max_tokens=64
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == done.choices[0].message.parsed


def test_an_answer_cut_short_is_told_by_the_parser(model: OpenAI, real: Address) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        model.chat.completions.parse(model=real.model, messages=user(), response_format=Trip, max_tokens=3)


GRAMMAR = 'start: "go " ("left" | "right") " " /[0-9]/'


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ({"regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"choice": ["red", "green", "blue"]}, "red|green|blue"),
        ({"grammar": GRAMMAR}, "go (left|right) [0-9]"),
        ({"json": {"enum": [1, "two", None]}}, '1|"two"|null'),
    ],
)
def test_structured_outputs_in_vllms_terms(model: OpenAI, real: Address, spec: dict[str, Any], pattern: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"structured_outputs": spec}}
    chat = model.chat.completions.create(model=real.model, messages=user("Go."), **options)
    assert re.fullmatch(pattern, (chat.choices[0].message.content or "").strip())
    (choice,) = model.completions.create(model=real.model, prompt="The answer is ", **options).choices
    assert re.fullmatch(pattern, choice.text.strip())
    assert choice.finish_reason == "stop"


def test_the_embedded_model_answers_alike_twice(model: OpenAI, real: Address) -> None:
    def answer(**options: Any) -> str:
        done = model.chat.completions.create(
            model=real.model, messages=user("Tell me a story."), max_tokens=12, **options
        )
        return done.choices[0].message.content or ""

    assert answer(temperature=0) == answer(temperature=0)
    assert answer(temperature=1, seed=5) == answer(temperature=1, seed=5)
