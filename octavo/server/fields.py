"""Request bodies: which fields there are, their types, and what becomes of each.

A request's class is its table of fields. A field is honoured (plain type), `Inert` (accepted because it changes no
result) or `Unbuilt` (refused unless its value asks for nothing); any other name is refused. So nothing that a client
asks for is silently ignored. `field_table` gives the same table to documentation and tests.

Numeric bounds are `core.params`'; what depends on the model is checked by `frontend`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Raw

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams

MAX_FIELD_BYTES = 2**20
"""Most JSON bytes of one field; fields that carry the prompt are bounded by the body alone."""

Kind = type[msgspec.Struct]


@dataclass(frozen=True)
class Inert:
    """Marks a field that is accepted and changes no result."""


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """Marks a field that is refused unless null or one of `neutral`, the values that ask for nothing.

    Compared by identity: typing caches Annotated by equality, where (0,) is (False,).
    """

    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Bulky:
    """Marks a field that carries the prompt, hence may be large."""


Refused = Annotated[Any, Unbuilt()]
RefusedFlag = Annotated[Any, Unbuilt((False,))]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    """A last chunk carries the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Every chunk carries the usage so far."""


class Part(msgspec.Struct, kw_only=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None

    image_url: Refused = None
    video_url: Refused = None
    input_audio: Refused = None
    file: Refused = None
    refusal: Refused = None


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Raw] | None = None
    """A list has the form of `Part`."""
    name: str | None = None

    refusal: Refused = None
    audio: Refused = None
    annotations: Annotated[Any, Unbuilt(([],))] = None
    tool_calls: Annotated[Any, Unbuilt(([],))] = None
    tool_call_id: Refused = None
    function_call: Refused = None
    reasoning: Refused = None
    reasoning_content: Refused = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What completions and chat completions share; None means absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: Raw | None = None
    """In the form of `StreamOptions`."""
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None

    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    user: Annotated[str | None, Inert()] = None
    metadata: Annotated[dict[str, str] | None, Inert()] = None
    store: Annotated[bool | None, Inert()] = None
    service_tier: Annotated[str | None, Inert()] = None
    safety_identifier: Annotated[str | None, Inert()] = None
    prompt_cache_key: Annotated[str | None, Inert()] = None
    prompt_cache_retention: Annotated[str | None, Inert()] = None
    prompt_cache_options: Annotated[Any, Inert()] = None

    response_format: Annotated[Any, Unbuilt(({"type": "text"},))] = None
    structured_outputs: Refused = None
    priority: Annotated[Any, Unbuilt((0,))] = None
    use_beam_search: RefusedFlag = None
    length_penalty: Annotated[Any, Unbuilt((1, 1.0))] = None
    truncate_prompt_tokens: Refused = None
    spaces_between_special_tokens: Annotated[Any, Unbuilt((True,))] = None
    return_tokens_as_token_ids: RefusedFlag = None
    logits_processors: Refused = None
    request_id: Refused = None
    kv_transfer_params: Refused = None
    vllm_xargs: Refused = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Annotated[Raw, Bulky()]
    echo: bool | None = None
    logprobs: int | None = None

    suffix: Annotated[Any, Unbuilt(("",))] = None
    best_of: Annotated[Any, Unbuilt((1,))] = None
    prompt_embeds: Refused = None


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Raw], Bulky()]
    """Each in the form of `Message`."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    chat_template: Refused = None
    tools: Annotated[Any, Unbuilt(([],))] = None
    tool_choice: Annotated[Any, Unbuilt(("none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, Unbuilt((True, False))] = None
    functions: Annotated[Any, Unbuilt(([],))] = None
    function_call: Annotated[Any, Unbuilt(("none", "auto"))] = None
    documents: Refused = None
    modalities: Annotated[Any, Unbuilt((["text"],))] = None
    audio: Refused = None
    prediction: Refused = None
    moderation: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None
    echo: RefusedFlag = None
    include_reasoning: Annotated[Any, Unbuilt((True,))] = None
    mm_processor_kwargs: Refused = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """One of `prompt` and `messages`."""

    model: str | None = None
    prompt: Annotated[str | None, Bulky()] = None
    messages: Annotated[list[Raw] | None, Bulky()] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    chat_template: Refused = None
    tools: Annotated[Any, Unbuilt(([],))] = None
    mm_processor_kwargs: Refused = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: Annotated[list[int], Bulky()]


Use = Literal["honoured", "inert", "unbuilt"]


@dataclass(frozen=True)
class Field:
    """A row of the table: a request field, its type as text and what becomes of it."""

    name: str
    type: str
    use: Use
    required: bool
    neutral: tuple[Any, ...]
    bulky: bool
    decoder: msgspec.json.Decoder[Any]


@cache
def field_table(kind: Kind) -> dict[str, Field]:
    """The fields of request class `kind` by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {info.name: _field(info.name, hints[info.name], info.required) for info in msgspec.structs.fields(kind)}


def _field(name: str, hint: Any, required: bool) -> Field:
    plain, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    unbuilt = next((mark for mark in marks if isinstance(mark, Unbuilt)), None)
    use: Use = "unbuilt" if unbuilt else "inert" if Inert() in marks else "honoured"
    text = "" if unbuilt else str(plain.__name__ if isinstance(plain, type) else plain)
    neutral = unbuilt.neutral if unbuilt else ()
    decoder = msgspec.json.Decoder(Raw if plain == Raw | None else plain)  # null is dealt with before
    return Field(name, text, use, required, neutral, Bulky() in marks, decoder)


T = TypeVar("T", bound=msgspec.Struct)


def parse(kind: type[T], data: bytes | Raw, prefix: str = "") -> T:
    """`data`, a JSON object, as `kind`; `prefix` is where it stands in the body. Null counts as absent.

    Raises InvalidRequest that names the field at fault.
    """
    try:
        fields = _splitter(kind).decode(data)
    except msgspec.ValidationError as error:
        raise _wrong_object(str(error), kind, prefix) from None
    except _NOT_JSON as error:
        raise _not_json(error, prefix.rstrip(".")) from None
    values: dict[str, Any] = {}
    for name, field in field_table(kind).items():
        raw = getattr(fields, name)
        value = None if raw is msgspec.UNSET else _value(field, raw, prefix + name)
        if value is not None:
            values[name] = value
        elif field.required:
            raise InvalidRequest(f"{prefix + name} is missing", prefix + name)
    return kind(**values)


@cache
def _splitter(kind: Kind) -> msgspec.json.Decoder[Any]:
    """Splits an object into `kind`'s fields, none decoded yet; ends at the first unknown or missing one."""
    fields = [
        (info.name, Raw) if info.required else (info.name, Raw | msgspec.UnsetType, msgspec.UNSET)
        for info in msgspec.structs.fields(kind)
    ]
    return msgspec.json.Decoder(
        msgspec.defstruct(f"Raw{kind.__name__}", fields, kw_only=True, forbid_unknown_fields=True)
    )


_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _value(field: Field, raw: Raw, name: str) -> Any:
    size = len(memoryview(raw))
    if size == 4 and bytes(raw) == b"null":
        return None
    if size > MAX_FIELD_BYTES and not field.bulky:
        raise InvalidRequest(f"{name} has {size} bytes of JSON, more than {MAX_FIELD_BYTES}", name)
    try:
        value = field.decoder.decode(raw)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise InvalidRequest(f"{name}{path.rstrip('`')}: {what}", name) from None
    except _NOT_JSON as error:
        raise _not_json(error, name) from None
    if field.use == "unbuilt" and not _is_one_of(value, field.neutral):
        raise InvalidRequest(f"{name} is not supported by this version: leave it out", name)
    return value


def _not_json(error: Exception, name: str) -> InvalidRequest:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InvalidRequest(f"{name or 'the body'} is not valid JSON in UTF-8: {reason}", name or None)


def _wrong_object(text: str, kind: Kind, prefix: str) -> InvalidRequest:
    """msgspec's `text` in the terms of the request. Linear: a field's name may be megabytes long."""
    what, _, rest = text.partition(" field `")
    where = prefix + rest.removesuffix("`")
    if what == "Object missing required":
        return InvalidRequest(f"{where} is missing", where)
    if what == "Object contains unknown":
        return InvalidRequest(f"unknown field {where[:200]!r}{_similar(rest.removesuffix('`'), kind)}", where)
    name = prefix.rstrip(".")
    return InvalidRequest(f"{name or 'the body'} must be a JSON object: {text}", name or None)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership in which True is not 1."""
    return any(type(value) is type(item) and value == item for item in values)


def _similar(name: str, kind: Kind) -> str:
    close = difflib.get_close_matches(name[:100], field_table(kind), n=1)
    return f": did you mean {close[0]!r}?" if close else ": remove it"


_SAMPLING = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name != "max_tokens"
)


def sampling_fields(request: GenerationRequest) -> dict[str, Any]:
    """The sampling parameters that the client gave, max_tokens and logprobs apart."""
    values = ((name, getattr(request, name)) for name in _SAMPLING)
    return {name: value for name, value in values if value is not None}
