"""The official client's completions, of the scripted model."""

from __future__ import annotations

from openai import AsyncOpenAI, OpenAI

from tests.clients.scripted import ScriptedBackend


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
