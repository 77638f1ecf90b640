"""What becomes of an answer's text: reasoning, content and calls, streamed as whole."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from octavo.core.errors import ConfigError
from octavo.server import ServerSettings
from tests.server.scripted import LAST, ScriptedBackend, chunks_of, client_of, function

USER = {"role": "user", "content": "a"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [function("get_weather", WEATHER), function("now")]

CALLS: dict[str, list[str]] = {
    "hermes": [
        'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🙂", "days": 3}}\n</tool_call>'
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call> and so',
        "<tool_call>no call</tool_call>",
    ],
    "llama3_json": [
        '{"name": "get_weather", "parameters": {"city": "Bern"}}',
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
        '{"answer": 42}',
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bern"}}, {"name": "now", "arguments": {}}]'
    ],
    "pythonic": ['[get_weather(city="Bern", days=2), now()]', "[1, 2]"],
    "deepseek_v3": [
        "Well<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Bern"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ],
    "openai": [
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>',
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello.",
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>"
    ],
    "granite": ['<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Bern"}}]'],
    "glm45": [
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>"
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Bern"}<|tool_call_end|><|tool_calls_section_end|>'
    ],
}
PLAIN = ["", "Hello, 🙂 wörld.", "<tool", '["a"] {"b": 1}', "\n\n", "</think>x"]
THOUGHT = ["<think>Hm.\n</think>\n\n", "<think>endless", "[THINK]so[/THINK]"]
JSON_CALLS = [
    '[{"name": "get_weather", "parameters": {"city": "Bern", "days": 3}}]',
    '[{"name": "now", "parameters": {}}, {"name": "now", "parameters": {}}]',
    '[{"name": "get_weather", "parameters": {"ci',
]


def reasoning_of(tool: str) -> str:
    return "openai_gptoss" if tool == "openai" else "qwen3"


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices that a stream tells, with the fields of a whole answer."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for told in chunk["choices"]:
            choice = choices.setdefault(told["index"], {"content": "", "reasoning": "", "calls": [], "logprobs": []})
            delta = told["delta"]
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert (call["index"], call["type"]) == (len(choice["calls"]), "function")
                    choice["calls"].append({"name": call["function"]["name"], "arguments": ""})
                choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            choice["logprobs"] += (told["logprobs"] or {"content": []})["content"]
            choice["finish_reason"] = told["finish_reason"]
            choice["stop_reason"] = told.get("stop_reason")
    return choices


def told(answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of a whole answer."""
    return {
        choice["index"]: {
            "content": choice["message"]["content"] or "",
            "reasoning": choice["message"].get("reasoning", ""),
            "calls": [call["function"] for call in choice["message"].get("tool_calls", ())],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in answer["choices"]
    }


async def both(
    answers: list[str], body: dict[str, Any], *, tool: str = "hermes", reasoning: str = "qwen3", **script: Any
) -> Any:
    """The whole answer, after comparing the streamed one with it."""
    body = {"messages": [USER], "n": len(answers)} | body
    backend = ScriptedBackend(answers, formats=(tool, reasoning), **script)
    async with client_of(backend, tool_call_parser=tool, reasoning_parser=reasoning) as http:
        whole = await http.post("/v1/chat/completions", json=body)
        assert whole.status_code == 200, whole.text
        stream = await http.post("/v1/chat/completions", json=body | {"stream": True})
        assert joined(chunks_of(stream)) == told(whole.json())
        return whole.json()


@pytest.mark.parametrize("tool", CALLS)
async def test_streamed_equals_whole(tool: str) -> None:
    """Every format, with and without reasoning, in pieces of any size, cut off anywhere."""
    rng = random.Random(tool)
    reasoning = reasoning_of(tool)
    pool = [*CALLS[tool], *PLAIN, *(a + b for a, b in itertools.product(THOUGHT, CALLS[tool]))]
    for seed in range(25):
        body: dict[str, Any] = {
            "tools": TOOLS,
            "parallel_tool_calls": rng.random() < 0.7,
            "include_reasoning": rng.random() < 0.7,
            "max_tokens": rng.choice([5, 40, 1000]),
            "logprobs": rng.random() < 0.3,
            "stop": rng.choice([None, "}", ["now", "B"]]),
        }
        answers = [rng.choice(pool) for _ in range(rng.randint(1, 3))]
        await both(answers, body, tool=tool, reasoning=reasoning, most=rng.choice([1, 4, 50]), seed=seed)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
async def test_streamed_equals_whole_when_constrained(choice: Any) -> None:
    for seed, most in itertools.product(range(6), (1, 7)):
        body = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": seed % 2 == 0, "logprobs": seed == 0}
        await both([JSON_CALLS[seed % 3], *JSON_CALLS[:2]], body, most=most, seed=seed)


@pytest.mark.parametrize("tool", CALLS)
async def test_calls_of_every_format(tool: str) -> None:
    answer = await both([CALLS[tool][0]], {"tools": TOOLS}, tool=tool, reasoning=reasoning_of(tool))
    (choice,) = answer["choices"]
    call = choice["message"]["tool_calls"][0]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Bern", "Zürich 🙂")
    assert (call["type"], choice["finish_reason"]) == ("function", "tool_calls")


async def test_content_is_null_when_there_are_only_calls() -> None:
    choices = (await both(CALLS["hermes"], {"tools": TOOLS}))["choices"]
    assert [choice["message"]["content"] for choice in choices[1:]] == ["and so", "<tool_call>no call</tool_call>"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "tool_calls", "stop"]
    assert "tool_calls" not in choices[2]["message"]
    only = (await both(['<tool_call>{"name": "now", "arguments": {}}</tool_call>'], {"tools": TOOLS}))["choices"][0]
    assert only["message"]["content"] is None
    assert (await both([""], {"tools": TOOLS}))["choices"][0]["message"]["content"] == ""


async def test_the_first_delta_of_a_call_names_it() -> None:
    body = {"messages": [USER], "tools": TOOLS, "stream": True}
    async with client_of(ScriptedBackend(CALLS["hermes"][:1])) as http:
        chunks = chunks_of(await http.post("/v1/chat/completions", json=body))
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", ())]
    firsts = [call for call in calls if "id" in call]
    assert [call["index"] for call in firsts] == [0, 1]
    assert len({call["id"] for call in firsts}) == 2
    assert all(call["id"].startswith("call_") for call in firsts)
    assert [call["function"] for call in firsts] == [
        {"name": "get_weather", "arguments": ""},
        {"name": "now", "arguments": ""},
    ]
    rest = [call for call in calls if "id" not in call]
    assert all(call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"} for call in rest)
    assert len(rest) > 10, "arguments stream as they come"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_a_message_has_one_call_without_parallel_calls() -> None:
    for answers, body in ((CALLS["hermes"][:1], {}), (JSON_CALLS[1:2], {"tool_choice": "required"})):
        answer = await both(answers, {"tools": TOOLS, "parallel_tool_calls": False, **body})
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_reasoning_has_a_field_of_its_own() -> None:
    text = "<think>Hm.</think>Yes."
    message = (await both([text], {}))["choices"][0]["message"]
    assert (message["reasoning"].strip(), message["content"]) == ("Hm.", "Yes.")
    message = (await both([text], {"include_reasoning": False}))["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == (None, "Yes.")
    async with client_of(ScriptedBackend([text]), reasoning_parser="none") as http:
        body = {"messages": [USER], "skip_special_tokens": False}
        message = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        assert (message.get("reasoning"), message["content"]) == (None, text)


THOUGHTS = [
    ("hermes", "qwen3", "<think>Hm.</think>Yes.", 5),
    ("hermes", "qwen3", "\n<think>Hm.</think>Yes.", 5),
    ("hermes", "qwen3", "Yes.", 0),
    ("hermes", "qwen3", "Yes.<think>Hm.</think>", 0),
    ("hermes", "qwen3", "<think>Hm.", 4 + 1),
    ("mistral", "mistral", "[THINK]Hm.[/THINK]Yes.", 5),
    (
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        len("s") + 1 + len("Hm.") + 1,
    ),
]


@pytest.mark.parametrize(("tool", "reasoning", "text", "count"), THOUGHTS)
async def test_reasoning_is_counted_and_can_be_left_out(tool: str, reasoning: str, text: str, count: int) -> None:
    """In tokens, streamed or not; what is left out shows neither in log-probabilities nor in ids."""
    body = {"messages": [USER], "logprobs": True, "return_token_ids": True, "include_reasoning": False}
    backend = ScriptedBackend([text], formats=(tool, reasoning), most=3)
    async with client_of(backend, tool_call_parser=tool, reasoning_parser=reasoning) as http:
        whole = (await http.post("/v1/chat/completions", json=body)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = chunks_of(await http.post("/v1/chat/completions", json=body | options))
    assert whole["usage"] == last["usage"]
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    (choice,) = whole["choices"]
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"] - count
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
    assert streamed == choice["token_ids"]
    told = "".join(position["token"] for position in choice["logprobs"]["content"])
    assert told.endswith(choice["message"]["content"] or "")
    assert "Hm" not in told or text.startswith("Yes.")


async def test_the_template_shows_the_formats() -> None:
    """Without flags, and only where the request has tools."""
    text = '<think>Hm.</think><tool_call>{"name": "now", "arguments": {}}</tool_call>'
    template = "{# <think> <tool_call> #}" + LAST
    async with client_of(ScriptedBackend([text], template=template)) as http:
        for tools, called in ((TOOLS, True), ([], False)):
            body = {"messages": [USER], "tools": tools, "skip_special_tokens": False}
            message = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
            assert message["reasoning"] == "Hm."
            assert ("tool_calls" in message) is called
            assert (message["content"] is None) is called


async def test_ids_of_calls_suit_the_template() -> None:
    """Mistral's refuse others."""
    answer = await both(CALLS["mistral"], {"tools": TOOLS}, tool="mistral")
    ids = [call["id"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert all(len(id) == 9 and id.isalnum() for id in ids)


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused_with_the_list(flag: str) -> None:
    names: dict[str, Any] = {flag: "hermez"}
    with pytest.raises(ConfigError, match=rf"--{flag.replace('_', '-')} is 'hermez'.*mistral"):
        ServerSettings(served_model_names=("m",), **names)


async def test_what_the_template_does_not_read_is_refused() -> None:
    async def status(template: str, **body: Any) -> tuple[int, Any]:
        async with client_of(ScriptedBackend(["a"], template=LAST + template)) as http:
            answer = await http.post("/v1/chat/completions", json={"messages": [USER], **body})
            return answer.status_code, answer.json().get("error", {}).get("param")

    reads = "{{ reasoning_effort }}{{ documents }}"
    for field, value in {"reasoning_effort": "low", "documents": [{"text": "a"}]}.items():
        assert await status("", **{field: value}) == (400, field)
        assert await status(reads, **{field: value}) == (200, None)
    thinks = "{% if enable_thinking %}x{% endif %}"
    assert await status(thinks, reasoning_effort="none") == (200, None)
    assert await status(thinks, reasoning_effort="high") == (400, "reasoning_effort")
    body: dict[str, Any] = {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}
    assert await status(reads, **body) == (400, "reasoning_effort")
