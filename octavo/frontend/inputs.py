"""From a prompt and sampling parameters to a `Request` that the engine cannot fail on.

Owns every check that needs the model or the tokenizer, and the defaults of generation_config. The numeric bounds of
parameters are `core.params`'; what a server adds to a prompt (chat templates) is its caller's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from octavo.config.engine import EngineConfig
from octavo.core.errors import InvalidRequest
from octavo.core.params import INT64_MAX, SamplingParams, StructuredOutputs
from octavo.core.request import Request
from octavo.structured import Vocabulary, compile_grammar
from octavo.text import Tokenizer, check_unicode


class TextPrompt(TypedDict):
    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
"""Text, token ids, or a dictionary of either with an optional `cache_salt` that keeps its prefix blocks apart."""

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class InputProcessor:
    """Validates and tokenizes. Stateless after construction, so any thread may call it."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.model.vocab_size
        self.max_model_len = config.scheduler.max_model_len
        self._defaults = config.model.sampling_defaults
        self._eos = frozenset(config.model.eos_token_ids)
        self.vocabulary = (
            None if tokenizer is None else Vocabulary(tokenizer, self.vocab_size, config.model.eos_token_ids)
        )
        """The tokenizer for grammars."""

    def default_params(self, max_tokens: int | None = None, **given: Any) -> SamplingParams:
        """`given` values, where not None, over generation_config's defaults over SamplingParams' own.

        `max_tokens` None stays None: `process` makes it what is left of the context, or generation_config's
        max_new_tokens where that is less.
        """
        values: dict[str, Any] = {name: self._defaults[name] for name in _DEFAULTS if name in self._defaults}
        if "top_k" in values:
            values["top_k"] = int(values["top_k"])
        values |= {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(max_tokens=max_tokens, **values)
        except TypeError as error:
            raise InvalidRequest(f"unknown sampling parameter: {error}") from None

    def process(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        arrival: float,
        cache_salt: str = "",
    ) -> tuple[Request, str | None]:
        """The request, and the prompt's text where it was text. Raises InvalidRequest naming the parameter.

        With structured outputs this compiles a grammar, for up to 0.2 s, and prepares the vocabulary first.
        The grammar alone then says where the text ends: `ignore_eos` has no effect.
        """
        text, ids, salt = _parse(prompt)
        if ids is None:
            assert text is not None
            ids = self.tokenize(text)
        ids = self._check_prompt(ids)
        self._check_params(params)
        bad_words = self._bad_word_ids(params.bad_words or ())
        self._check_choice(params, bad_words)
        params = params.replace(max_tokens=self._max_tokens(params, len(ids)))
        check_unicode(cache_salt or salt, "cache_salt")
        grammar = ""
        if params.structured_outputs is not None:
            grammar = self._compile(params.structured_outputs)
            params = params.replace(structured_outputs=None, ignore_eos=False)
        return Request(request_id, ids, params, arrival, bad_words, cache_salt or salt, grammar=grammar), text

    def _compile(self, spec: StructuredOutputs) -> str:
        if self.vocabulary is None:
            raise InvalidRequest(
                "structured_outputs need the tokenizer, which skip_tokenizer_init left out", "structured_outputs"
            )
        return compile_grammar(spec, self.vocabulary)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, refused before tokenizing when its size alone shows that it is too long."""
        if self.tokenizer is None:
            raise InvalidRequest(
                "a text prompt needs the tokenizer, which skip_tokenizer_init left out: give prompt_token_ids", "prompt"
            )
        self.check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def check_text(self, text: str) -> None:
        """Refuses text whose size alone shows that its tokens cannot fit, or that is not Unicode."""
        size = check_unicode(text, "prompt")
        longest = 1 if self.tokenizer is None else self.tokenizer.max_token_bytes
        if size > self.max_model_len * longest:
            raise self._too_long(f"at least {-(-size // longest)}")

    def _too_long(self, length: str) -> InvalidRequest:
        return InvalidRequest(
            f"the prompt has {length} tokens, but the context holds {self.max_model_len} with one left to generate: "
            "shorten it or raise --max-model-len",
            "prompt",
        )

    def _check_prompt(self, ids: Sequence[int]) -> list[int]:
        try:
            checked = [operator.index(token) for token in ids]
        except TypeError:
            raise InvalidRequest("prompt_token_ids must be integers", "prompt") from None
        if bool in set(map(type, ids)):
            raise InvalidRequest("prompt_token_ids must be integers, not booleans", "prompt")
        if not checked:
            raise InvalidRequest("the prompt is empty: give at least one token", "prompt")
        if len(checked) >= self.max_model_len:
            raise self._too_long(str(len(checked)))
        self._check_ids("prompt", checked)
        return checked

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"{name}: token id {token} is outside the vocabulary [0, {self.vocab_size})", name)

    def _check_params(self, params: SamplingParams) -> None:
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        if params.stops and self.tokenizer is None:
            raise InvalidRequest(
                "stop strings need the tokenizer, which skip_tokenizer_init left out: use stop_token_ids", "stop"
            )
        for stop in params.stops:
            check_unicode(stop, "stop")
        if params.seed is not None and params.seed + params.n - 1 > INT64_MAX:
            raise InvalidRequest(f"seed {params.seed} + n {params.n} - 1 exceeds {INT64_MAX}: lower it", "seed")

    def _bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences that spell each word, at the start of a text and after a space."""
        if words and self.tokenizer is None:
            raise InvalidRequest(
                "bad_words need the tokenizer, which skip_tokenizer_init left out: use logit_bias", "bad_words"
            )
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            check_unicode(word, "bad_words")
            bare = word.lstrip()
            if not bare:
                raise InvalidRequest(f"bad_words: {word!r} is only white space", "bad_words")
            assert self.tokenizer is not None
            for form in (bare, " " + bare):
                found[tuple(self.tokenizer.encode(form, add_special_tokens=False))] = None
        ids = [list(form) for form in found if form]
        self._check_ids("bad_words", [token for form in ids for token in form])
        return ids

    def _check_choice(self, params: SamplingParams, bad_words: list[list[int]]) -> None:
        """Some allowed token is left at every position."""
        left = set(params.allowed_token_ids or ())
        if not left:
            return
        left.difference_update(form[0] for form in bad_words if len(form) == 1)
        if params.min_tokens:
            left.difference_update(self._eos, params.stop_token_ids or ())
        if not left:
            raise InvalidRequest(
                "bad_words and min_tokens forbid every one of allowed_token_ids: allow another token",
                "allowed_token_ids",
            )

    def _max_tokens(self, params: SamplingParams, prompt_len: int) -> int:
        left = self.max_model_len - prompt_len
        if params.max_tokens is None:
            chosen = min(left, int(self._defaults.get("max_new_tokens", left)))
            if params.min_tokens > chosen:
                raise InvalidRequest(
                    f"min_tokens is {params.min_tokens}, but only {chosen} tokens can follow the prompt: lower it",
                    "min_tokens",
                )
            return chosen
        if params.max_tokens > left:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}, but the context of {self.max_model_len} tokens leaves {left} "
                f"after the prompt's {prompt_len}: lower max_tokens or raise --max-model-len",
                "max_tokens",
            )
        return params.max_tokens


def _parse(prompt: Prompt) -> tuple[str | None, Sequence[int] | None, str]:
    """Text, token ids and cache salt of any form of prompt; ids win where both are given."""
    if isinstance(prompt, str):
        return prompt, None, ""
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | str):
        return None, prompt, ""
    raise InvalidRequest(f"a prompt is text, token ids or a dictionary of one, not {type(prompt).__name__}", "prompt")


def _parse_mapping(prompt: Mapping[str, Any]) -> tuple[str | None, Sequence[int] | None, str]:
    unknown = sorted(map(str, set(prompt) - _PROMPT_KEYS))
    if unknown:
        raise InvalidRequest(f"prompt: {unknown[0]!r} is not supported, give prompt or prompt_token_ids", "prompt")
    text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt", "")
    if text is None and ids is None:
        raise InvalidRequest("the prompt has neither prompt nor prompt_token_ids", "prompt")
    if text is not None and not isinstance(text, str):
        raise InvalidRequest("prompt must be text", "prompt")
    if ids is not None and (isinstance(ids, str | bytes) or not isinstance(ids, Sequence)):
        raise InvalidRequest("prompt_token_ids must be a list of integers", "prompt")
    if not isinstance(salt, str):
        raise InvalidRequest("cache_salt must be text", "cache_salt")
    return text, ids, salt
