"""The official client, sync and async, over every route and field, against the scripted model.

Tools and structured output are test_openai_tools.py's.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.conftest import Address, client_of
from tests.clients.scripted import ScriptedBackend
from tests.clients.shared import CLOCK, content_of, extra, user

# --- models


def test_models(client: OpenAI, name: str) -> None:
    assert [card.id for card in client.models.list()] == [name]
    assert client.models.retrieve(name).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert "none" in caught.value.message


async def test_models_async(aclient: AsyncOpenAI, name: str) -> None:
    assert [card.id async for card in aclient.models.list()] == [name]


# --- completions


def test_completion(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("the end")
    done = client.completions.create(model=name, prompt="once", max_tokens=50)
    assert backend.prompt == "once"
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("the end", "stop", 0)
    assert done.id.startswith("cmpl-")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (4, 8, 12)


def test_completion_defaults_to_16_tokens(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("x" * 40)
    (choice,) = client.completions.create(model=name, prompt="once").choices
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


def test_completion_of_several_prompts(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("same", "same")
    done = client.completions.create(model=name, prompt=["one", "two"], max_tokens=9)
    assert [(choice.index, choice.text) for choice in done.choices] == [(0, "same"), (1, "same")]
    assert sorted(backend.prompts[-2:]) == ["one", "two"]


def test_completion_of_token_ids_with_echo(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say(" world")
    (choice,) = client.completions.create(model=name, prompt=[*b"hello"], echo=True, max_tokens=20).choices
    assert choice.text == "hello world"


def test_completion_streams(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("héllo 👋 world")
    stream = client.completions.create(
        model=name, prompt="x", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [*stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "héllo 👋 world"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("héllo 👋 world".encode()) + 1


def test_completion_logprobs(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("abc")
    (choice,) = client.completions.create(model=name, prompt="x", max_tokens=9, logprobs=2).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[:3] == ["a", "b", "c"]
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[:3] == [-1.0, -1.0, -1.0]


async def test_completion_async(aclient: AsyncOpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("the end", "the end")
    done = await aclient.completions.create(model=name, prompt="once", max_tokens=50)
    stream = await aclient.completions.create(model=name, prompt="once", max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == done.choices[0].text == "the end"


# --- chat


def test_chat(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("hi there")
    done = client.chat.completions.create(model=name, messages=user())
    assert backend.prompt == "<user>hello<assistant>"
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("hi there", None, "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(backend.prompt), len("hi there") + 1)


def test_chat_streams_what_it_answers_at_once(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("déjà vu", "déjà vu")
    whole = client.chat.completions.create(model=name, messages=user())
    with client.chat.completions.create(
        model=name, messages=user(), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = [*stream]
    assert content_of(chunks) == whole.choices[0].message.content == "déjà vu"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    ending = chunks[-2].choices[0]
    assert (ending.finish_reason, ending.delta.content, ending.delta.role) == ("stop", None, None)


async def test_chat_async(aclient: AsyncOpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("hi", "hi")
    done = await aclient.chat.completions.create(model=name, messages=user())
    stream = await aclient.chat.completions.create(model=name, messages=user(), stream=True)
    assert content_of([chunk async for chunk in stream]) == done.choices[0].message.content == "hi"


def test_chat_messages_of_every_role(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": "now"}], "name": "ann"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "assistant", "content": "noon", "refusal": None},
        {"role": "user", "content": "thanks"},
    ]
    backend.say("welcome")
    client.chat.completions.create(model=name, messages=messages, tools=[CLOCK])
    for part in ("be brief", "what", "now", "get_time", "noon", "<user>thanks<assistant>"):
        assert part in backend.prompt


def test_chat_sampling_fields_reach_the_engine(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("hello")
    client.chat.completions.create(
        model=name,
        messages=user(),
        temperature=0.5,
        top_p=0.75,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        seed=7,
        max_completion_tokens=40,
        logit_bias={"65": -100},
        stop=["END", "STOP"],
        user="ann",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={
            "top_k": 5,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [1],
            "bad_words": ["bad"],
            "allowed_token_ids": [*range(257)],
            "ignore_eos": False,
            "skip_special_tokens": True,
        },
    )
    params = backend.params[-1]
    wanted = {
        "temperature": 0.5,
        "top_p": 0.75,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "seed": 7,
        "max_tokens": 40,
        "logit_bias": {65: -100.0},
        "stops": ("END", "STOP"),
        "top_k": 5,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": (1,),
        "bad_words": ("bad",),
        "allowed_token_ids": tuple(range(257)),
    }
    assert {name: getattr(params, name) for name in wanted} == wanted


def test_chat_stop_and_length(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("one two three", "one two three")
    (choice,) = client.chat.completions.create(model=name, messages=user(), stop=" two").choices
    assert (choice.message.content, choice.finish_reason) == ("one", "stop")
    (choice,) = client.chat.completions.create(model=name, messages=user(), max_tokens=5).choices
    assert (choice.message.content, choice.finish_reason) == ("one t", "length")


def test_chat_choices(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("abc", "abc")  # choice c of the scripted model is turned by c
    done = client.chat.completions.create(model=name, messages=user(), n=3)
    assert [choice.message.content for choice in done.choices] == ["abc", "bca", "cab"]
    assert done.usage is not None
    assert done.usage.completion_tokens == 12
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=name, messages=user(), n=3, stream=True):
        for part in chunk.choices:
            texts[part.index] += part.delta.content or ""
    assert texts == ["abc", "bca", "cab"]


def test_chat_logprobs(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("é!", "é!")
    done = client.chat.completions.create(model=name, messages=user(), logprobs=True, top_logprobs=3)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[0xC3], [0xA9], [0x21]]  # no end token
    assert all(len(token.top_logprobs) == 3 and token.logprob == -1.0 for token in logprobs.content)
    streamed = []
    for chunk in client.chat.completions.create(
        model=name, messages=user(), logprobs=True, top_logprobs=3, stream=True
    ):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed += choice.logprobs.content or []
    assert streamed == logprobs.content


def test_chat_continues_an_assistants_message_when_asked(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    messages: list[ChatCompletionMessageParam] = [*user(), {"role": "assistant", "content": "I am"}]
    backend.say(" well", " well")
    client.chat.completions.create(
        model=name, messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": False}
    )
    assert backend.prompt.endswith("<assistant>I am")
    client.chat.completions.create(model=name, messages=messages)
    assert backend.prompt.endswith("<assistant>I am<assistant>")


# --- reasoning


def test_reasoning_is_apart_from_content(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say(*["<think>\nhm, well\n</think>\n\nyes"] * 2)
    message = client.chat.completions.create(model=name, messages=user()).choices[0].message
    thought = extra(message, "reasoning")
    assert (thought.strip(), (message.content or "").strip()) == ("hm, well", "yes")
    chunks = [*client.chat.completions.create(model=name, messages=user(), stream=True)]
    assert "".join(extra(chunk.choices[0].delta, "reasoning") for chunk in chunks) == thought
    assert content_of(chunks) == message.content


def test_chat_template_kwargs_reach_the_template(client: OpenAI, backend: ScriptedBackend, name: str) -> None:
    backend.say("yes")
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    message = client.chat.completions.create(model=name, messages=user(), extra_body=kwargs).choices[0].message
    assert backend.prompt.endswith("<assistant><think></think>")
    assert message.content == "yes"


# --- errors


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


# --- the wire


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
