"""How the tokens of a request are chosen. Owns the numeric bounds of every sampling parameter.

Does not know models: what depends on the vocabulary or the context length is checked by the frontend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from octavo.core.errors import InvalidRequest

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIAS = 1024
MAX_BAD_WORDS = 1024
INT64_MAX = 2**63 - 1

# name -> (lowest, highest, whether the lowest itself is excluded)
BOUNDS: dict[str, tuple[float, float, bool]] = {
    "n": (1, MAX_N, False),
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "top_k": (-1, INT64_MAX, False),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 100.0, True),
    "seed": (-(2**63), INT64_MAX, False),
    "max_tokens": (1, INT64_MAX, False),
    "min_tokens": (0, INT64_MAX, False),
    "logprobs": (0, MAX_LOGPROBS, False),
    "prompt_logprobs": (0, MAX_LOGPROBS, False),
}


class StructuredOutputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the generated text must look like: exactly one of the forms.

    `json` is a JSON Schema (draft 2020-12), as a dictionary or its text; `json_object` any JSON object; `regex` a
    regular expression that the whole text matches; `choice` one of some texts; `grammar` a context-free grammar in Lark
    or GBNF syntax. `lead`, which servers write, has Lark rules for what may come before the constraint or instead of
    it, which they call @then.
    Raises InvalidRequest (param "structured_outputs") for none, several or wrongly typed ones; what they say is checked
    when the request is admitted.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    lead: str = ""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {
            "json": (dict, str),
            "json_object": bool,
            "regex": str,
            "choice": (list, tuple),
            "grammar": str,
        }
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _unstructured(f"needs exactly one of {', '.join(kinds)}, not {found}")
        for name in given:
            if not isinstance(getattr(self, name), kinds[name]):
                raise _unstructured(f"{name} cannot be {type(getattr(self, name)).__name__}")
        if not isinstance(self.json_object, bool) or not isinstance(self.lead, str):
            raise _unstructured("json_object is true or false, and lead is text")
        if self.choice is not None and not (self.choice and all(isinstance(text, str) for text in self.choice)):
            raise _unstructured("choice must be a list of at least one text")


def _unstructured(problem: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs: {problem}", "structured_outputs")


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of one request, with vLLM's names and meaning.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `top_p` 1 switch those filters off. `max_tokens` None means up to
    the context length. `logprobs` k reports the k best tokens and the sampled one; 0 the sampled one alone.
    Raises InvalidRequest (a ValueError) that names the parameter when a value is out of bounds.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            _check_number(name, getattr(self, name), bounds)
        for name in ("stop", "bad_words"):
            self._normalise(name, _strings(name, getattr(self, name)))
        for name in ("stop_token_ids", "allowed_token_ids"):
            self._normalise(name, _token_ids(name, getattr(self, name)))
        if self.allowed_token_ids == ():
            raise InvalidRequest("allowed_token_ids is empty: leave it out to allow every token", "allowed_token_ids")
        if self.logit_bias is not None:
            self._normalise("logit_bias", _bias(self.logit_bias))
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise _unstructured(f"must be StructuredOutputs, not {type(self.structured_outputs).__name__}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}: lower it", "min_tokens"
            )
        if self.stops and not self.detokenize:
            raise InvalidRequest("stop strings need the text: set detokenize=True or use stop_token_ids", "stop")

    def _normalise(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, normalised."""
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_history(self) -> bool:
        """True when the logits depend on earlier tokens of the sequence (penalties, bad words)."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.bad_words)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied, validated anew."""
        return msgspec.structs.replace(self, **changes)


def _check_number(name: str, value: float | None, bounds: tuple[float, float, bool]) -> None:
    low, high, open_low = bounds
    if value is None and name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
        return
    kinds: tuple[type, ...] = (int,) if isinstance(low, int) else (int, float)
    if value is None or isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidRequest(f"{name} must be a number, not {value!r}", name)
    if not (low < value if open_low else low <= value) or value > high:  # NaN is neither
        opening = "(" if open_low else "["
        raise InvalidRequest(f"{name} is {value!r}, outside {opening}{low}, {high}]", name)


def _sequence(name: str, value: Any, kind: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not all(kind(item) for item in value):
        raise InvalidRequest(f"{name} must be a list of {what}", name)
    return tuple(value)


def _strings(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = _sequence(name, [value] if isinstance(value, str) else value, lambda s: isinstance(s, str), "strings")
    limit = MAX_STOPS if name == "stop" else MAX_BAD_WORDS
    if len(items) > limit:
        raise InvalidRequest(f"{name} has {len(items)} entries, more than {limit}", name)
    if any(not item or len(item) > MAX_STOP_CHARS for item in items):
        raise InvalidRequest(f"{name} entries must have 1 to {MAX_STOP_CHARS} characters", name)
    return items


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return _sequence(
        name, value, lambda i: isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31, "token ids"
    )


def _bias(value: dict[int, float]) -> dict[int, float]:
    if len(value) > MAX_BIAS:
        raise InvalidRequest(f"logit_bias has {len(value)} entries, more than {MAX_BIAS}", "logit_bias")
    try:
        bias = {int(token): float(amount) for token, amount in value.items()}
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest("logit_bias must map token ids to numbers", "logit_bias") from None
    for token, amount in bias.items():
        if not 0 <= token < 2**31 or not -100.0 <= amount <= 100.0:
            raise InvalidRequest(f"logit_bias[{token}] is {amount}, outside [-100, 100] or no token id", "logit_bias")
    return bias
