from __future__ import annotations

import json

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParams

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams
from octavo.server.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from octavo.server.table import field_table, parse

REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def test_every_field_of_openai_is_known() -> None:
    """Honoured, inert or refused by name: none of its fields is a typo."""
    assert set(ChatParams.__annotations__) | {"stream"} <= set(field_table(ChatRequest))
    assert set(CompletionParams.__annotations__) | {"stream"} <= set(field_table(CompletionRequest))


def test_every_sampling_parameter_can_be_sent() -> None:
    """But those of vLLM's that its server does not take either."""
    for request in (ChatRequest, CompletionRequest):
        assert set(SamplingParams.__struct_fields__) - {"detokenize"} <= set(field_table(request))


@pytest.mark.parametrize("kind", REQUESTS)
def test_unbuilt_fields_are_refused_unless_they_ask_for_nothing(kind: type) -> None:
    table = field_table(kind)
    required = {"messages": [], "prompt": "a", "tokens": []}
    body = {name: required[name] for name, field in table.items() if field.required}
    for name, field in table.items():
        if field.use != "unbuilt":
            continue
        for value in (None, *field.neutral):
            parse(kind, json.dumps(body | {name: value}).encode())
        for value in ("something", {"a": 1}, [1], 17):
            with pytest.raises(InvalidRequest, match=name) as caught:
                parse(kind, json.dumps(body | {name: value}).encode())
            assert caught.value.param == name


def test_neutral_values_are_compared_with_their_type() -> None:
    parse(CompletionRequest, b'{"prompt": "a", "watermarking": false, "priority": 0, "use_beam_search": false}')
    for field in (b'"watermarking": 0', b'"priority": false', b'"use_beam_search": 0'):
        with pytest.raises(InvalidRequest, match="not supported"):
            parse(CompletionRequest, b'{"prompt": "a", ' + field + b"}")


def test_a_typo_gets_a_hint() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'") as caught:
        parse(ChatRequest, b'{"messages": [], "temprature": 1}')
    assert caught.value.param == "temprature"


def test_null_is_absent() -> None:
    request = parse(CompletionRequest, b'{"prompt": "a", "n": null, "stop" : null }')
    assert (request.n, request.stop) == (None, None)
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        parse(CompletionRequest, b'{"prompt": null}')
