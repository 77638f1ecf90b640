"""The official client's tools, called by the scripted model."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

from tests.clients.scripted import ScriptedBackend, call, chosen
from tests.clients.shared import CLOCK, WEATHER, calls_of, extra, user


def test_tools_auto(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("Let me look. " + call("get_weather", '{"city": "Paris", "days": 2}') + call("get_time", "{}"), "Hello")
    done = client.chat.completions.create(model=name, messages=user(), tools=[WEATHER, CLOCK], tool_choice="auto")
    assert "get_weather" in backend.prompt
    (choice,) = done.choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == "Let me look."
    assert calls_of(choice.message) == [("get_weather", {"city": "Paris", "days": 2}), ("get_time", {})]
    ids = [made.id for made in choice.message.tool_calls or []]
    assert all(ids)
    assert len({*ids}) == 2
    (choice,) = client.chat.completions.create(model=name, messages=user(), tools=[WEATHER]).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "Hello", None)


def test_tools_stream_as_they_come_whole(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    text = "<think>which?</think>Well: " + call("get_weather", '{"city": "Oslo", "days": 3}') + call("get_time", "{}")
    backend.say(text, text)
    whole = client.chat.completions.create(model=name, messages=user(), tools=[WEATHER, CLOCK]).choices[0]
    content, reason = "", None
    made: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(model=name, messages=user(), tools=[WEATHER, CLOCK], stream=True):
        (part,) = chunk.choices
        content += part.delta.content or ""
        reason = part.finish_reason or reason
        for delta in part.delta.tool_calls or []:
            assert delta.function is not None
            if delta.index not in made:
                assert delta.id
                assert delta.type == "function"
                made[delta.index] = [delta.function.name or "", ""]
            made[delta.index][1] += delta.function.arguments or ""
    assert content == (whole.message.content or "")
    assert reason == whole.finish_reason == "tool_calls"
    assert [(name, json.loads(text)) for name, text in made.values()] == calls_of(whole.message)


def test_the_clients_streaming_helper_gathers_calls(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("Well: " + call("get_weather", '{"city": "Oslo", "days": 3}'))
    kinds = set()
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    tools = cast("list[ChatCompletionToolParam]", [strict])
    with client.chat.completions.stream(model=name, messages=user(), tools=tools) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    assert calls_of(final.choices[0].message) == [("get_weather", {"city": "Oslo", "days": 3})]
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


def test_tool_choice_none_calls_nothing(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("Hello")
    (choice,) = client.chat.completions.create(model=name, messages=user(), tools=[WEATHER], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Hello", None, "stop")


def test_one_call_without_parallel_tool_calls(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say(call("get_time", '{"zone": "UTC"}') + call("get_time", '{"zone": "CET"}'))
    done = client.chat.completions.create(model=name, messages=user(), tools=[CLOCK], parallel_tool_calls=False)
    assert calls_of(done.choices[0].message) == [("get_time", {"zone": "UTC"})]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_forced_call_is_read_from_its_json(client: OpenAI, backend: ScriptedBackend, name: str, choice: Any) -> None:
    backend.say("<think>hm</think>" + chosen("get_time", '{"zone": "CET"}'))
    done = client.chat.completions.create(model=name, messages=user(), tools=[CLOCK], tool_choice=choice)
    assert calls_of(done.choices[0].message) == [("get_time", {"zone": "CET"})]
    assert extra(done.choices[0].message, "reasoning") == "hm"
    assert backend.params[-1].structured_outputs is not None
