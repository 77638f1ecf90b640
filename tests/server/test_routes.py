from __future__ import annotations

import dataclasses
import re

import httpx
import openai
import pytest

from octavo.server import create_app
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS, Live


async def test_models(client: openai.OpenAI, http: httpx.AsyncClient) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "org/echo"]
    assert client.models.retrieve("org/echo").id == "org/echo"
    (card, _) = (await http.get("/v1/models")).json()["data"]
    assert card["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_an_unknown_model_is_404(http: httpx.AsyncClient, path: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    answer = await http.post(path, json=prompt | {"model": "gpt-4"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-4" in error["message"]
    assert (await http.post(path, json=prompt)).status_code == 200, "the model's name may be left out"


async def test_tokenize(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})).json()
    assert answer == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [97, 195, 169],
        "token_strs": ["a", "\ufffd", "\ufffd"],
    }
    body = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    assert bytes((await http.post("/tokenize", json=body)).json()["tokens"]) == b"<user>a"


async def test_detokenize(http: httpx.AsyncClient) -> None:
    answer = await http.post("/detokenize", json={"tokens": [97, 195, 169, 256]})
    assert answer.json() == {"prompt": "aé<eos>"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a" * 30000}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [], "extra": 1}, "extra"),
    ],
)
async def test_tokenizing_refuses(http: httpx.AsyncClient, path: str, body: object, param: str) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_health_and_a_dead_engine(http: httpx.AsyncClient, backend: EchoBackend) -> None:
    assert (await http.get("/health")).status_code == 200
    backend.dead = True
    for answer in (await http.get("/health"), await http.post("/v1/completions", json={"prompt": "a"})):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"


async def test_version(http: httpx.AsyncClient) -> None:
    assert set((await http.get("/version")).json()) == {"version"}


@pytest.mark.parametrize("path", ["/v1", "/v1/models/", "/v1/nothing", "/", "/%ff"])
async def test_unknown_paths(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


async def test_wrong_method(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "POST" in answer.json()["error"]["message"]


async def test_a_bug_shows_nothing_of_itself(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "BUG", "max_tokens": 9})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "a bug" not in answer.text


@pytest.mark.parametrize(("word", "status", "reason"), [("FAIL", 500, "kernel panic"), ("DIE", 503, "out of luck")])
async def test_errors_of_the_engine(http: httpx.AsyncClient, word: str, status: int, reason: str) -> None:
    body = {"prompt": f"{word} here", "max_tokens": 9}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]
    stream = await http.post("/v1/completions", json=body | {"stream": True})
    assert stream.status_code == 200, "it had begun"
    events = stream.text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert reason in events[-3]
    assert '"error":{"message"' in events[-3]


def test_the_client_sees_an_error_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="echo", prompt="FAIL here", stream=True)
    with pytest.raises(openai.APIError, match="kernel panic"):
        list(stream)


async def test_every_route_but_health_asks_for_the_key(backend: EchoBackend) -> None:
    settings = dataclasses.replace(SETTINGS, api_keys=("s3cret", "other é"))
    transport = httpx.ASGITransport(create_app(backend, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        assert (await http.get("/health")).status_code == 200
        for path in ("/v1/models", "/version", "/metrics", "/v1/completions", "/nothing", "/health/"):
            for given in (None, "Bearer wrong", "s3cret", "Basic s3cret", "Bearer", "Bearer s3crets"):
                answer = await http.get(path, headers={"authorization": given} if given else {})
                assert answer.status_code == 401, (path, given)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer s3cret", "bearer  s3cret", "Bearer other é"):
            headers = {b"authorization": given.encode()}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_metrics(http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        body = {"prompt": "abcde", "max_tokens": 4, "stream": stream}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r'^(octavo:\S+?)\{model_name="echo"\} (\S+)$', answer.text, re.M))
    assert values["octavo:num_requests_running"] == "2.0"
    assert values["octavo:num_requests_waiting"] == "1.0"
    assert values["octavo:kv_cache_usage_perc"] == "0.25"
    assert values["octavo:prompt_tokens_total"] == "7.0"
    for counter in ("generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        assert f"octavo:{counter}_total" in values
    for histogram in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert values[f"octavo:{histogram}_seconds_count"] == "2.0"
    assert values["octavo:e2e_request_latency_seconds_count"] == "2.0"
    assert values["octavo:inter_token_latency_seconds_count"] == "6.0", "three gaps each, streamed or not"
    assert 'octavo:request_success_total{finished_reason="length",model_name="echo"} 2.0' in answer.text
    assert 'octavo:time_to_first_token_seconds_bucket{le="+Inf",model_name="echo"} 2.0' in answer.text


def test_two_apps_have_metrics_of_their_own(live: Live) -> None:
    first, second = (create_app(EchoBackend(), SETTINGS).state.context.metrics for _ in range(2))
    first.total.observe(1.0)
    assert b'octavo:e2e_request_latency_seconds_count{model_name="echo"} 1.0' in first.text()
    assert b'octavo:e2e_request_latency_seconds_count{model_name="echo"} 0.0' in second.text()
