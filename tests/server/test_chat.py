from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from octavo.server import create_app
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS, Live

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "héllo 🙂"}]
RENDERED = "<user>héllo 🙂<assistant>"


def chat(client: openai.OpenAI, messages: Any = HELLO, **body: Any) -> Any:
    return client.chat.completions.create(model="echo", messages=messages, **body)


def test_answer(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", RENDERED)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    size = len(RENDERED.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (size, size + 1)


def test_chunks_begin_with_the_role_and_end_empty(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *body, last, usage = chunks
    assert body[0].choices[0].delta.model_dump(exclude_none=True) == {"role": "assistant", "content": ""}
    assert all(chunk.choices[0].delta.role is None for chunk in body[1:])
    assert "".join(chunk.choices[0].delta.content for chunk in body) == RENDERED
    assert last.choices[0].delta.model_dump(exclude_none=True) == {}
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage == chat(client).usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1


def test_events_on_the_wire(web: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 1}
    answer = web.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"delta":{},' in events[-3]
    assert '"usage"' not in answer.text, "usage appears only when asked for"


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stop": ["🙂"]}, {"max_tokens": 9}, {"logprobs": True, "n": 2}])
def test_streamed_equals_whole(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = chat(client, **extra)
    texts = [""] * len(whole.choices)
    reasons: list[str | None] = [None] * len(texts)
    logprobs: list[list[Any]] = [[] for _ in texts]
    for chunk in chat(client, stream=True, **extra):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
        logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content if choice.logprobs else [] for choice in whole.choices]


def test_logprobs_have_the_bytes_of_tokens_and_no_end(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content) == RENDERED.encode()
    assert content[0].token == "<"
    assert content[0].logprob == -1.0
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
        ("=", -0.5, [61]),
        ("<", -1.0, [60]),
    ]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    one = chat(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content[0]
    assert [top.token for top in one.top_logprobs] == ["="], "the chosen token is not among the best one"


def test_prompt_logprobs_and_token_ids(client: openai.OpenAI) -> None:
    answer = chat(client, extra_body={"prompt_logprobs": 0, "return_token_ids": True})
    assert len(answer.prompt_logprobs) == len(RENDERED.encode()) == len(answer.prompt_token_ids)
    assert answer.choices[0].token_ids == [*RENDERED.encode(), 256]
    chunks = list(chat(client, stream=True, extra_body={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == list(RENDERED.encode())
    told = [getattr(chunk.choices[0], "token_ids", []) for chunk in chunks]
    assert [token for ids in told for token in ids] == [*RENDERED.encode(), 256]


def test_roles_parts_and_names(client: openai.OpenAI) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]},
        {"role": "user", "content": "u", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "annotations": []},
    ]
    assert chat(client, messages).choices[0].message.content == "<system>d<system>p\nq<user:ann>u<assistant><assistant>"


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    message = chat(client).choices[0].message
    assert chat(client, [*HELLO, message, *HELLO]).choices[0].finish_reason == "stop"


def test_template_parameters(client: openai.OpenAI) -> None:
    def text(messages: Any = HELLO, **body: Any) -> str:
        return str(chat(client, messages, extra_body=body).choices[0].message.content)

    assert text(add_generation_prompt=False) == "<user>héllo 🙂"
    assert text(chat_template_kwargs={"shout": True}) == "<user>héllo 🙂!<assistant>"
    half = [*HELLO, {"role": "assistant", "content": "I am"}]
    assert text(half).endswith("<assistant>I am<assistant>"), "nothing is continued unless asked"
    assert text(half, continue_final_message=True).endswith("<assistant>I am")


def test_limits_on_tokens(client: openai.OpenAI, live: Live) -> None:
    assert chat(client, max_completion_tokens=3).choices[0].message.content == "<us"
    chat(client)
    left = 4096 - len(RENDERED.encode())
    assert live.backend.requests[-1].params.max_tokens == left, "up to the context unless told"


def test_harmless_fields_are_accepted(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        tool_choice="none",
        tools=[],
        modalities=["text"],
        extra_body={"priority": 0, "echo": False},
    )
    assert answer.choices[0].message.content == RENDERED


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [USER] * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "messages"),
        ({"messages": [USER, {"role": "wizard", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [USER | {"colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
        ({"messages": [USER], "temprature": 1}, "temprature"),
        ({"messages": [USER], "guided_json": {}}, "guided_json"),
        ({"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": [USER], "priority": 1}, "priority"),
        ({"messages": [USER], "top_logprobs": 3}, "top_logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"messages": [USER], "logprobs": 3}, "logprobs"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens"),
        ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": [USER], "max_completion_tokens": 99999}, "max_completion_tokens"),
        ({"messages": [USER], "max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [USER], "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
        ),
        ({"messages": [USER], "stream": True, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({"messages": [USER], "stream": "yes"}, "stream"),
        ({"messages": [USER], "n": 1.5}, "n"),
        ({"messages": [USER], "seed": 2**70}, "seed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused_with_the_parameter(
    http: httpx.AsyncClient, body: dict[str, Any], param: str, stream: bool
) -> None:
    answer = await http.post("/v1/chat/completions", json={"stream": stream} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


async def test_without_template_or_tokenizer() -> None:
    backend = EchoBackend(tokenizer=False, template=False)
    transport = httpx.ASGITransport(create_app(backend, SETTINGS))
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        answer = await http.post("/v1/chat/completions", json={"messages": [USER]})
        assert answer.status_code == 400
        assert "--chat-template" in answer.json()["error"]["message"]
        answer = await http.post("/v1/completions", json={"prompt": "text"})
        assert answer.json()["error"]["param"] == "prompt"
        body = {"prompt": [1, 2], "logprobs": 0, "return_token_ids": True}
        answer = await http.post("/v1/completions", json=body)
        (choice,) = answer.json()["choices"]
        assert choice["text"] == ""
        assert choice["token_ids"] == [1, 2, 256]
        assert choice["logprobs"]["tokens"] == ["token_id:1", "token_id:2"]
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 400


async def test_async_client(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = HELLO
        whole = await client.chat.completions.create(model="org/echo", messages=messages)
        assert whole.model == "org/echo"
        stream = await client.chat.completions.create(model="echo", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content
