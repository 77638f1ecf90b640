"""From what a client sends to token ids: text, ids, lists of either, or messages through the chat template.

Pure functions that any thread may call. The length of a prompt is judged by `frontend`, before text is tokenized
where its size alone shows that it is too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.core.errors import InvalidRequest
from octavo.server.errors import rename
from octavo.server.fields import CalledTool, FunctionCall, Message, Part
from octavo.server.table import parse
from octavo.text import ChatPrompt, ChatTemplate, normalise_messages
from octavo.text.chat import TAIL_CHARS
from octavo.text.template import check_names

if TYPE_CHECKING:
    from octavo.server.context import Context

MAX_PROMPTS = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")

_text = msgspec.json.Decoder(str)
_texts = msgspec.json.Decoder(list[str])
_ids = msgspec.json.Decoder(list[int])
_id_lists = msgspec.json.Decoder(list[list[int]])


def completion_prompts(raw: msgspec.Raw, max_model_len: int) -> list[str | list[int]]:
    """The prompts of a completion request: a string, token ids, or a list of either.

    What cannot be served is refused by its count of brackets or commas, before millions of objects are made of it.
    """
    text = bytes(raw)
    head = text[:1] + text[1:].lstrip()[:1]
    try:
        if head.startswith(b'"'):
            return [_text.decode(text)]
        if head.startswith(b"[["):
            if text.count(b"[") > MAX_PROMPTS + 1:
                raise _too_many()
            return _checked([*_id_lists.decode(text)], max_model_len)
        if head.startswith(b'["'):
            return _checked([*_texts.decode(text)], max_model_len)
        _check_length(text.count(b",") + 1, max_model_len)
        return _checked([_ids.decode(text)], max_model_len)
    except msgspec.ValidationError:
        raise InvalidRequest("prompt must be a string, token ids, or a list of either", "prompt") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("prompt is not valid JSON in UTF-8", "prompt") from None


def _checked(prompts: list[str | list[int]], max_model_len: int) -> list[str | list[int]]:
    if prompts in ([], [[]]):
        raise InvalidRequest("prompt is empty: give at least one token", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise _too_many()
    for prompt in prompts:
        if not isinstance(prompt, str):
            _check_length(len(prompt), max_model_len)
    return prompts


def _check_length(count: int, max_model_len: int) -> None:
    if count >= max_model_len:
        raise InvalidRequest(
            f"prompt has {count} tokens, but the context holds {max_model_len} with one left to generate", "prompt"
        )


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"prompt has more than {MAX_PROMPTS} entries: send several requests", "prompt")


def template_of(context: Context, source: str | None) -> ChatTemplate:
    """The server's chat template, or `source`, which came with a request."""
    backend = context.backend
    if source is None:
        if backend.chat_template is None:
            raise InvalidRequest(
                "this server has no chat template: use /v1/completions or start it with --chat-template", "messages"
            )
        return backend.chat_template
    if not context.settings.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template is taken only by a server started with --trust-request-chat-template: leave it out",
            "chat_template",
        )
    if backend.tokenizer is None:
        raise InvalidRequest("chat_template needs the tokenizer, which skip_tokenizer_init left out", "chat_template")
    return ChatTemplate.foreign(source, backend.tokenizer)


def chat_prompt(
    context: Context,
    template: ChatTemplate,
    messages: Sequence[msgspec.Raw],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    template_kwargs: Mapping[str, Any] | None,
) -> ChatPrompt:
    """`messages` as `template` writes them; control tokens in what the client sent are text."""
    conversation = _conversation(messages, context.max_model_len)
    last = conversation[-1]["role"]
    if continue_final_message and last != "assistant":
        raise InvalidRequest(
            f"continue_final_message needs an assistant message at the end, not one of the role {last}",
            "continue_final_message",
        )
    check_names(template_kwargs or {})
    begin = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    try:
        rendered = template.rendered(
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=begin,
            continue_final_message=bool(continue_final_message),
            **(template_kwargs or {}),
        )
        context.inputs.check_text(rendered.text)
        ids = template.encode(rendered, add_special_tokens=bool(add_special_tokens))
    except InvalidRequest as error:
        raise rename(error, {"prompt": "messages"}) from None
    return ChatPrompt(ids, rendered.text[-TAIL_CHARS:])


def _conversation(messages: Sequence[msgspec.Raw], limit: int) -> list[dict[str, Any]]:
    """`messages` as a template wants them. Every message costs a token, so more than `limit` cannot fit."""
    if not messages:
        raise InvalidRequest("messages is empty: give at least one", "messages")
    if len(messages) > limit:
        raise InvalidRequest(f"{len(messages)} messages cannot fit in a context of {limit} tokens", "messages")
    return normalise_messages([_message(raw, f"messages[{i}]") for i, raw in enumerate(messages)])


def _message(raw: msgspec.Raw, where: str) -> dict[str, Any]:
    """What of a message is given. Each role has fields that the others have not."""
    message = parse(Message, raw, f"{where}.")
    role = message.role
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role is {role[:100]!r}: it must be one of {', '.join(ROLES)}", f"{where}.role")
    if message.content is None and role != "assistant":
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    told: dict[str, Any] = {"role": role, "content": _content(message.content, where)}
    told |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None:
        told["reasoning"] = reasoning
    if message.tool_calls:
        told["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}].") for i, call in enumerate(message.tool_calls)]
    for name, owner in (("tool_call_id", "tool"), ("reasoning", "assistant"), ("tool_calls", "assistant")):
        if name in told and role != owner:
            raise InvalidRequest(f"{where}.{name} belongs to the role {owner}, not {role}", f"{where}.{name}")
    return told


def _content(content: str | list[msgspec.Raw] | None, where: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    return [{"type": "text", "text": _part(part, f"{where}.content[{i}]")} for i, part in enumerate(content)]


def _call(raw: msgspec.Raw, where: str) -> dict[str, Any]:
    call = parse(CalledTool, raw, where)
    function = parse(FunctionCall, call.function, f"{where}function.")
    told = {"type": "function", "function": {"name": function.name, "arguments": function.arguments}}
    return told if call.id is None else {"id": call.id, **told}


def _part(raw: msgspec.Raw, where: str) -> str:
    part = parse(Part, raw, f"{where}.")
    if part.type != "text":
        raise InvalidRequest(f"{where}.type is {part.type[:100]!r}: only text is supported", f"{where}.type")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is missing", f"{where}.text")
    return part.text
