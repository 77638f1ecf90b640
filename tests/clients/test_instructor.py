"""instructor: its modes of structured output, nested models, lists, partial answers and retries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import instructor
import pytest
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field, field_validator

from tests.clients.conftest import Address
from tests.clients.scripted import ScriptedBackend, call, chosen


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]
    age: int = Field(ge=0, le=99)


class Team(BaseModel, extra="forbid"):
    """Nested models and a list of bounded length."""

    lead: Person
    members: list[Person] = Field(max_length=2)
    motto: str | None = Field(max_length=8)


class Cat(BaseModel, extra="forbid"):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel, extra="forbid"):
    kind: Literal["dog"]
    loud: bool


class Pet(BaseModel, extra="forbid"):
    """A union told apart by a field."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Grown(BaseModel):
    age: int

    @field_validator("age")
    @classmethod
    def check(cls, age: int) -> int:
        if age < 18:
            raise ValueError("must be of age")
        return age


MODES = [Mode.TOOLS, Mode.JSON_SCHEMA]


@pytest.fixture(scope="session")
def client(scripted: Address) -> Iterator[OpenAI]:
    with OpenAI(base_url=scripted.base_url, api_key=scripted.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def model(real: Address) -> Iterator[OpenAI]:
    """A client of the embedded model."""
    with OpenAI(base_url=real.base_url, api_key=real.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Team, Pet])
def test_the_grammar_makes_models_of_any_answer(
    model: OpenAI, real: Address, mode: Mode, kind: type[BaseModel]
) -> None:
    found = instructor.from_openai(model, mode=mode).chat.completions.create(
        model=real.model,
        messages=[{"role": "user", "content": "Describe one."}],
        response_model=kind,
        max_retries=0,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(found, kind)


@pytest.mark.parametrize("mode", [*MODES, Mode.JSON])
def test_every_mode_reads_the_answer(client: OpenAI, scripted: Address, backend: ScriptedBackend, mode: Mode) -> None:
    person = '{"name": "Ann", "age": 30}'
    backend.say(chosen("Person", person) if mode == Mode.TOOLS else person)
    found, done = instructor.from_openai(client, mode=mode).chat.completions.create_with_completion(
        model=scripted.model, messages=[{"role": "user", "content": "Who?"}], response_model=Person, max_retries=0
    )
    assert found.model_dump() == {"name": "Ann", "age": 30}
    assert done.usage.completion_tokens > 0
    assert backend.params[-1].structured_outputs is not None


def test_a_retry_corrects_the_answer(client: OpenAI, scripted: Address, backend: ScriptedBackend) -> None:
    backend.say(chosen("Grown", '{"age": 7}'), chosen("Grown", '{"age": 70}'))
    grown = instructor.from_openai(client).chat.completions.create(
        model=scripted.model,
        messages=[{"role": "user", "content": "How old?"}],
        response_model=Grown,
        max_retries=2,
    )
    assert grown.age == 70
    assert "must be of age" in backend.prompt  # the failed call and what was wrong with it went back
    assert '"age": 7' in backend.prompt


def test_a_retry_in_json_mode(client: OpenAI, scripted: Address, backend: ScriptedBackend) -> None:
    backend.say('{"age": 7}', '{"age": 70}')
    grown = instructor.from_openai(client, mode=Mode.JSON_SCHEMA).chat.completions.create(
        model=scripted.model,
        messages=[{"role": "user", "content": "How old?"}],
        response_model=Grown,
        max_retries=2,
    )
    assert grown.age == 70
    assert "must be of age" in backend.prompt


def test_lists_stream_item_by_item(client: OpenAI, scripted: Address, backend: ScriptedBackend) -> None:
    people = '{"tasks": [{"name": "Ann", "age": 1}, {"name": "Bob", "age": 2}]}'
    backend.say(people)
    found = instructor.from_openai(client, mode=Mode.JSON_SCHEMA).chat.completions.create_iterable(
        model=scripted.model, messages=[{"role": "user", "content": "Who?"}], response_model=Person
    )
    assert [*found] == [Person(name="Ann", age=1), Person(name="Bob", age=2)]


def test_partial_answers_stream(client: OpenAI, scripted: Address, backend: ScriptedBackend) -> None:
    backend.say(chosen("Team", '{"lead": {"name": "Ann", "age": 1}, "members": [], "motto": "on"}'))
    parts = [
        *instructor.from_openai(client).chat.completions.create_partial(
            model=scripted.model, messages=[{"role": "user", "content": "Who?"}], response_model=Team
        )
    ]
    assert len(parts) > 2
    assert parts[-1].model_dump() == {"lead": {"name": "Ann", "age": 1}, "members": [], "motto": "on"}


def test_parallel_calls(client: OpenAI, scripted: Address, backend: ScriptedBackend) -> None:
    backend.say(call("Cat", '{"kind": "cat", "lives": 9}') + call("Dog", '{"kind": "dog", "loud": true}'))
    found = instructor.from_openai(client, mode=Mode.PARALLEL_TOOLS).chat.completions.create(
        model=scripted.model,
        messages=[{"role": "user", "content": "Which?"}],
        response_model=Iterable[Cat | Dog],  # type: ignore[type-abstract]
    )
    assert [*found] == [Cat(kind="cat", lives=9), Dog(kind="dog", loud=True)]


async def test_async(scripted: Address, backend: ScriptedBackend) -> None:
    backend.say(chosen("Person", '{"name": "Bob", "age": 3}'))
    async with AsyncOpenAI(base_url=scripted.base_url, api_key=scripted.key, max_retries=0) as client:
        person = await instructor.from_openai(client).chat.completions.create(
            model=scripted.model, messages=[{"role": "user", "content": "Who?"}], response_model=Person
        )
    assert person.model_dump() == {"name": "Bob", "age": 3}
