"""The official client's chat completions, of the scripted model: messages, fields, choices, reasoning."""

from __future__ import annotations

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.scripted import ScriptedBackend
from tests.clients.shared import CLOCK, content_of, extra, user


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
