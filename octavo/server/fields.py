"""Request bodies: which fields there are, their types, and what becomes of each.

A request's class is its table of fields; `table` has the marks and the parser. The names are OpenAI's and vLLM's:
all of them stand here, honoured or not. Numeric bounds are `core.params`'; what depends on the model is checked by
`frontend`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Raw

from octavo.core.params import SamplingParams
from octavo.server.table import BoundedAs, Bulky, Form, Inert, Spelled, Unbuilt

Refused = Annotated[Any, Unbuilt()]
RefusedFlag = Annotated[Any, Unbuilt((False,))]
RefusedGuide = Annotated[Any, Unbuilt(instead="use structured_outputs")]

ROLE = Spelled(
    "system, developer, user, assistant or tool", {"enum": ["system", "developer", "user", "assistant", "tool"]}
)
PROMPT = Spelled(
    "text, token ids, or a list of either",
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "integer"}},
            {"type": "array", "items": {"type": "string"}},
            {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        ]
    },
)


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    """A last chunk carries the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Every chunk carries the usage so far."""
    include_obfuscation: Annotated[bool | None, Inert()] = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: Annotated[str, Inert()]
    schema: dict[str, Any]
    description: Annotated[str | None, Inert()] = None
    strict: Annotated[bool | None, Inert()] = None
    """The schema is enforced either way."""


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[Raw | None, Form(JsonSchemaFormat)] = None


class StructuredOutputsOption(msgspec.Struct, kw_only=True):
    """Exactly one of the first five."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    structural_tag: Refused = None
    whitespace_pattern: Refused = None
    disable_any_whitespace: RefusedFlag = None
    disable_additional_properties: RefusedFlag = None
    disable_fallback: Annotated[bool | None, Inert()] = None


class FunctionSpec(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, Inert()] = None
    """Required and named choices follow the schema either way."""


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: Annotated[Raw, Form(FunctionSpec)]


class FunctionName(msgspec.Struct, kw_only=True):
    name: str


class NamedToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: Annotated[Raw, Form(FunctionName)]


class AllowedTools(msgspec.Struct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[Raw], Form(NamedToolChoice)]


class AllowedToolsChoice(msgspec.Struct, kw_only=True):
    type: Literal["allowed_tools"]
    allowed_tools: Annotated[Raw, Form(AllowedTools)]


TOOL_CHOICE = Spelled(
    '"none", "auto", "required" or an object that names tools',
    {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {"$ref": "#/components/schemas/NamedToolChoice"},
            {"$ref": "#/components/schemas/AllowedToolsChoice"},
        ]
    },
    (NamedToolChoice, AllowedToolsChoice),
)


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str
    """JSON text of an object."""


class CalledTool(msgspec.Struct, kw_only=True):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: Annotated[Raw, Form(FunctionCall)]
    index: Annotated[int | None, Inert()] = None


class Part(msgspec.Struct, kw_only=True):
    """A piece of a message's content."""

    type: Annotated[str, Spelled("text", {"const": "text"})]
    text: str | None = None

    image_url: Refused = None
    video_url: Refused = None
    input_audio: Refused = None
    file: Refused = None
    refusal: Refused = None


class Message(msgspec.Struct, kw_only=True):
    role: Annotated[str, ROLE]
    content: Annotated[str | list[Raw] | None, Form(Part)] = None
    name: str | None = None
    tool_calls: Annotated[list[Raw] | None, Form(CalledTool)] = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Older name of `reasoning`."""

    refusal: Refused = None
    audio: Refused = None
    annotations: Annotated[Any, Unbuilt(([],))] = None
    function_call: Annotated[Any, Unbuilt(instead="use tool_calls")] = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What completions and chat completions share; None means absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: Annotated[Raw | None, Form(StreamOptions)] = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: Annotated[Raw | None, Form(ResponseFormat)] = None

    # vLLM's
    structured_outputs: Annotated[Raw | None, Form(StructuredOutputsOption)] = None
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
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    user: Annotated[str | None, Inert()] = None
    metadata: Annotated[dict[str, str] | None, Inert()] = None
    store: Annotated[bool | None, Inert()] = None
    service_tier: Annotated[str | None, Inert()] = None
    safety_identifier: Annotated[str | None, Inert()] = None
    prompt_cache_key: Annotated[str | None, Inert()] = None
    prompt_cache_retention: Annotated[str | None, Inert()] = None
    prompt_cache_options: Annotated[Any, Inert()] = None
    session_id: Annotated[str | None, Inert()] = None

    priority: Annotated[Any, Unbuilt((0,))] = None
    use_beam_search: RefusedFlag = None
    length_penalty: Annotated[Any, Unbuilt((1, 1.0))] = None
    truncate_prompt_tokens: Refused = None
    truncation_side: Refused = None
    spaces_between_special_tokens: Annotated[Any, Unbuilt((True,))] = None
    logits_processors: Refused = None
    logprob_token_ids: Refused = None
    repetition_detection: Refused = None
    thinking_token_budget: Refused = None
    watermarking: RefusedFlag = None
    stream_interval: Annotated[Any, Unbuilt((1,))] = None
    return_token_offsets: RefusedFlag = None
    return_prompt_text: RefusedFlag = None
    routed_experts_prompt_start: Annotated[Any, Unbuilt((0,))] = None
    kv_transfer_params: Refused = None
    ec_transfer_params: Refused = None
    vllm_xargs: Refused = None
    guided_json: RefusedGuide = None
    guided_json_object: Annotated[Any, Unbuilt((False,), "use structured_outputs")] = None
    guided_regex: RefusedGuide = None
    guided_choice: RefusedGuide = None
    guided_grammar: RefusedGuide = None
    guided_decoding_backend: RefusedGuide = None
    guided_whitespace_pattern: RefusedGuide = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Annotated[Raw, Bulky(), PROMPT]
    max_tokens: Annotated[int | None, BoundedAs("min_tokens")] = None
    """0 goes with echo."""
    echo: bool | None = None
    logprobs: int | None = None

    suffix: Annotated[Any, Unbuilt(("",))] = None
    best_of: int | None = None
    """Honoured where it asks for nothing: 1 or n."""
    prompt_embeds: Refused = None


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Raw], Bulky(), Form(Message)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    tools: Annotated[list[Raw] | None, Form(Tool)] = None
    tool_choice: Annotated[Raw | None, TOOL_CHOICE] = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, BoundedAs("logprobs")] = None
    max_completion_tokens: Annotated[int | None, BoundedAs("max_tokens")] = None

    functions: Annotated[Any, Unbuilt(([],), "use tools")] = None
    function_call: Annotated[Any, Unbuilt(("none", "auto"), "use tool_choice")] = None
    modalities: Annotated[Any, Unbuilt((["text"],))] = None
    audio: Refused = None
    prediction: Refused = None
    moderation: Refused = None
    verbosity: Annotated[Any, Unbuilt(("medium",))] = None
    web_search_options: Refused = None
    echo: Annotated[Any, Unbuilt((False,), "use continue_final_message")] = None
    mm_processor_kwargs: Refused = None
    media_io_kwargs: Refused = None
    return_mm_kwargs: Annotated[Any, Unbuilt((True,))] = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """One of `prompt` and `messages`."""

    model: str | None = None
    prompt: Annotated[str | None, Bulky()] = None
    messages: Annotated[list[Raw] | None, Bulky(), Form(Message)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Raw] | None, Form(Tool)] = None

    mm_processor_kwargs: Refused = None
    media_io_kwargs: Refused = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: Annotated[list[int], Bulky()]


_SAMPLING = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name not in ("max_tokens", "structured_outputs")
)


def sampling_fields(request: GenerationRequest) -> dict[str, Any]:
    """The sampling parameters that the client gave; not max_tokens, logprobs and structured_outputs."""
    values = ((name, getattr(request, name)) for name in _SAMPLING)
    return {name: value for name, value in values if value is not None}
