from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.live import Live

MIXED = "ab é 🙂 ไทย"


def complete(client: openai.OpenAI, **body: Any) -> Any:
    return client.completions.create(model="echo", **{"max_tokens": 100, **body})


def joined(stream: Any) -> tuple[dict[int, str], dict[int, str | None], list[Any]]:
    """Text and finish reason by choice, and the chunks."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunks


def test_text_and_its_usage(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=MIXED)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == MIXED
    assert answer.choices[0].finish_reason == "stop"
    size = len(MIXED.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (size, size + 1)
    assert answer.usage.total_tokens == 2 * size + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        ("[[", ["[["]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_every_form_of_prompt(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    assert [choice.text for choice in complete(client, prompt=prompt).choices] == texts


def test_sixteen_tokens_unless_told(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="x" * 30)
    assert answer.choices[0].text == "x" * 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompts", [' "a"', '[ "a"]', "[ 97 ]", "[ [ 97]]", " [ [97 ] ] "])
def test_white_space_around_prompts(web: httpx.Client, prompts: str) -> None:
    spaced = prompts.replace(" ", " \n" * 99)
    answer = web.post("/v1/completions", content=f'{{"prompt": {spaced}, "max_tokens": 1}}')
    assert answer.status_code == 200, answer.text


def test_prompts_times_choices(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=["abc", "de"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "abc"), (1, "bca"), (2, "de"), (3, "ed")]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 4 + 4 + 3 + 3
    texts, reasons, _ = joined(complete(client, prompt=["abc", "de"], n=2, stream=True))
    assert texts == {0: "abc", 1: "bca", 2: "de", 3: "ed"}
    assert set(reasons.values()) == {"stop"}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"stop": ["ไ"]},
        {"stop": "🙂 ", "n": 3},
        {"max_tokens": 7},
        {"echo": True},
        {"stop": "ab"},
        {"max_tokens": 1},
    ],
)
def test_streamed_equals_whole(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = complete(client, prompt=[MIXED, "second ab"], **extra)
    texts, reasons, chunks = joined(
        complete(client, prompt=[MIXED, "second ab"], stream=True, stream_options={"include_usage": True}, **extra)
    )
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, prompt="one two", stop="tw")
    assert answer.choices[0].text == "one "
    assert answer.choices[0].stop_reason == "tw"
    kept = complete(client, prompt="one two", stop="tw", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "one tw"


def test_echo(client: openai.OpenAI) -> None:
    assert complete(client, prompt="ab", echo=True).choices[0].text == "abab"
    assert complete(client, prompt=[97, 98], echo=True).choices[0].text == "abab"
    alone = complete(client, prompt="ab", echo=True, max_tokens=0)
    assert alone.choices[0].text == "ab"
    assert alone.choices[0].finish_reason == "length"
    assert alone.usage.completion_tokens == 0


def test_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, prompt="ab", logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["a", "b"], "the end token is not part of the answer"
    assert logprobs.token_logprobs == [-1.0, -1.0]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs[0] == {"a": -1.0, "b": -0.5}
    assert complete(client, prompt="ab").choices[0].logprobs is None


def test_logprobs_of_an_echoed_prompt(client: openai.OpenAI) -> None:
    """As evaluation harnesses ask for them."""
    logprobs = complete(client, prompt="ab", echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.token_logprobs == [None, -1.0]
    assert logprobs.top_logprobs[0] is None


@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"echo": True, "max_tokens": 0}, {"n": 2, "echo": True}])
def test_streamed_logprobs_equal_whole(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = complete(client, prompt=[MIXED, "xy"], logprobs=2, **extra)
    found: dict[int, dict[str, list[Any]]] = {}
    for chunk in complete(client, prompt=[MIXED, "xy"], logprobs=2, stream=True, **extra):
        for choice in chunk.choices:
            for name, values in choice.logprobs.model_dump().items():
                found.setdefault(choice.index, {}).setdefault(name, []).extend(values)
    assert found == {choice.index: choice.logprobs.model_dump() for choice in whole.choices}


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, prompt="abc", extra_body={"prompt_logprobs": 1}).choices[0]
    assert choice.prompt_logprobs == [
        None,
        {
            "98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            "99": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
        {
            "99": {"logprob": -1.0, "rank": 2, "decoded_token": "c"},
            "100": {"logprob": -0.5, "rank": 1, "decoded_token": "d"},
        },
    ]


def test_token_ids_on_request(client: openai.OpenAI) -> None:
    body = {"return_token_ids": True}
    choice = complete(client, prompt="ab", extra_body=body).choices[0]
    assert (choice.prompt_token_ids, choice.token_ids) == ([97, 98], [97, 98, 256])
    chunks = list(complete(client, prompt="ab", stream=True, extra_body=body))
    assert [t for chunk in chunks for t in chunk.choices[0].token_ids] == [97, 98, 256]
    assert chunks[0].choices[0].prompt_token_ids == [97, 98]


def test_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, prompt="abc", stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 4


def test_every_sampling_parameter_arrives(live: Live, web: httpx.Client) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.5,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "seed": 3,
        "n": 2,
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop": ["z"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "allowed_token_ids": [7, 8],
        "bad_words": ["q"],
        "logit_bias": {"7": 1.5},
        "max_tokens": 5,
        "cache_salt": "mine",
    }
    answer = web.post("/v1/completions", json={"prompt": "abc", **given})
    assert answer.status_code == 200, answer.text
    request = live.backend.requests[-1]
    assert request.cache_salt == given.pop("cache_salt")
    expected = given | {"logit_bias": {7: 1.5}, "stop": ("z",), "stop_token_ids": (9,), "bad_words": ("q",)}
    expected |= {"allowed_token_ids": (7, 8)}
    assert {name: getattr(request.params, name) for name in given} == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": [[1]] * 2000}, "prompt"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 100000}, "max_tokens"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**6}, "n"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "logprobs": 100}, "logprobs"),
        ({"prompt": "a" * 4000, "n": 128, "logprobs": 20, "echo": True}, "logprobs"),
        ({"prompt": ["a" * 4000] * 20, "n": 8, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"400": 1}}, "logit_bias"),
        ({"prompt": ["ok", "a" * 5000], "stream": True}, "prompt"),
        ({"prompt": [[97], [300]], "stream": True}, "prompt"),
    ],
)
async def test_refused_with_the_parameter(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 16384
