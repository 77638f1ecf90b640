from __future__ import annotations

from typing import Any

import pytest

from octavo.core.errors import InvalidRequest
from octavo.core.params import INT64_MAX, SamplingParams, StructuredOutputs
from octavo.core.request import Request
from octavo.frontend.inputs import InputProcessor
from tests.frontend.tiny import EOS, VOCAB, byte_tokenizer, tiny_config


def processor(tokenizer: bool = True, **config: Any) -> InputProcessor:
    return InputProcessor(tiny_config(**config), byte_tokenizer() if tokenizer else None)


def process(prompt: Any, inputs: InputProcessor | None = None, **params: Any) -> Request:
    return (inputs or processor()).process(prompt, SamplingParams(**params), "r", arrival=1.0)[0]


@pytest.mark.parametrize(
    "prompt", ["abc", {"prompt": "abc"}, [97, 98, 99], (97, 98, 99), {"prompt_token_ids": [97, 98, 99]}]
)
def test_every_form_of_prompt_gives_the_same_request(prompt: Any) -> None:
    assert process(prompt) == Request("r", [97, 98, 99], SamplingParams(), 1.0)


def test_text_is_kept_and_token_ids_win() -> None:
    inputs = processor()
    assert inputs.process("abc", SamplingParams(), "r", arrival=0.0)[1] == "abc"
    request, text = inputs.process({"prompt": "x", "prompt_token_ids": [5]}, SamplingParams(), "r", arrival=0.0)
    assert (request.prompt_token_ids, text) == ([5], "x")


def test_cache_salt_of_prompt_or_argument() -> None:
    inputs = processor()
    assert process({"prompt": "a", "cache_salt": "one"}).cache_salt == "one"
    request, _ = inputs.process(
        {"prompt": "a", "cache_salt": "one"}, SamplingParams(), "r", arrival=0.0, cache_salt="two"
    )
    assert request.cache_salt == "two"


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        ("", "prompt", "empty"),
        ([], "prompt", "empty"),
        ([VOCAB], "prompt", "257 is outside"),
        ([-1, 3], "prompt", "-1 is outside"),
        ([True, 3], "prompt", "booleans"),
        ([1.5], "prompt", "integers"),
        (["a"], "prompt", "integers"),
        (b"abc", "prompt", "not bytes"),
        (7, "prompt", "not int"),
        ({}, "prompt", "neither"),
        ({"prompt": 3}, "prompt", "text"),
        ({"prompt_token_ids": "abc"}, "prompt", "list of integers"),
        ({"prompt": "a", "multi_modal_data": {}}, "prompt", "multi_modal_data"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt", "text"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt", "surrogate"),
        ("a\ud800", "prompt", "surrogate at character 1"),
        ([1] * 64, "prompt", "64 tokens"),
        ("a" * 64, "prompt", "64 tokens"),
        ("é" * 200, "prompt", "at least 80 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        process(prompt)
    assert caught.value.param == param


def test_a_huge_text_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = processor()
    assert inputs.tokenizer is not None
    monkeypatch.setattr(inputs.tokenizer, "encode", lambda *args, **kwargs: pytest.fail("tokenized"))
    with pytest.raises(InvalidRequest, match="at least"):
        process("a" * (64 * inputs.tokenizer.max_token_bytes + 1), inputs)


def test_the_longest_prompt_leaves_one_token() -> None:
    assert process([1] * 63, max_tokens=None).params.max_tokens == 1


@pytest.mark.parametrize(("asked", "default", "given"), [(None, None, 60), (None, 7, 7), (None, 100, 60), (9, 7, 9)])
def test_max_tokens(asked: int | None, default: int | None, given: int) -> None:
    inputs = processor(sampling_defaults={} if default is None else {"max_new_tokens": default})
    assert process([1] * 4, inputs, max_tokens=asked).params.max_tokens == given


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"max_tokens": 61}, "max_tokens", "max_tokens is 61.*of 64 tokens leaves 60"),
        ({"max_tokens": None, "min_tokens": 61}, "min_tokens", "only 60"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids", "257"),
        ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids", "257"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias", "257"),
        ({"stop": "a\udfff"}, "stop", "surrogate"),
        ({"bad_words": ["\udfff"]}, "bad_words", "surrogate"),
        ({"bad_words": [" "]}, "bad_words", "white space"),
        ({"seed": INT64_MAX - 1, "n": 3}, "seed", "exceeds"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids", "forbid"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids", "forbid"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused(params: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        process([1, 2, 3, 4], **params)
    assert caught.value.param == param


def test_parameters_at_the_edge_are_accepted() -> None:
    process([0, VOCAB - 1], stop_token_ids=[VOCAB - 1], logit_bias={0: 1.0}, seed=INT64_MAX - 1, n=2)
    process([1], allowed_token_ids=[97, EOS], bad_words=["a"])


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [("a", {}, "prompt"), ([1], {"stop": "x"}, "stop"), ([1], {"bad_words": "x"}, "bad_words")],
)
def test_what_needs_text_is_refused_without_a_tokenizer(prompt: Any, params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="skip_tokenizer_init") as caught:
        process(prompt, processor(tokenizer=False), **params)
    assert caught.value.param == param


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    assert process([1], bad_words=["ab", " ab", "c"]).bad_word_ids == [[97, 98], [32, 97, 98], [99], [32, 99]]


def test_default_params_put_the_request_over_the_model_over_the_class() -> None:
    defaults = {"temperature": 0.25, "top_k": 40.0, "top_p": 0.9, "max_new_tokens": 5}
    inputs = processor(sampling_defaults=defaults)
    assert inputs.default_params(top_p=0.5, temperature=None) == SamplingParams(
        temperature=0.25, top_k=40, top_p=0.5, max_tokens=None
    )
    assert inputs.default_params(3, temperature=0.0).temperature == 0.0
    with pytest.raises(InvalidRequest, match="beam"):
        inputs.default_params(beam=3)


def test_structured_outputs_become_a_grammar() -> None:
    request = process([1], structured_outputs=StructuredOutputs(regex="[0-9]+"), ignore_eos=True, min_tokens=2)
    assert "[0-9]+" in request.grammar
    assert request.params == SamplingParams(min_tokens=2), "the engine needs no more than the grammar"
    assert process([1]).grammar == ""


@pytest.mark.parametrize(
    ("given", "tokenizer", "words"),
    [
        ({"regex": "("}, True, "unclosed"),
        ({"json": {"not": {}}}, True, "'not'"),
        ({"regex": "a"}, False, "skip_tokenizer_init"),
    ],
)
def test_structured_outputs_that_cannot_be_followed_are_refused(
    given: dict[str, Any], tokenizer: bool, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        process([1], processor(tokenizer), structured_outputs=StructuredOutputs(**given))
    assert caught.value.param == "structured_outputs"
