"""From what a client sends to token ids: text, ids, lists of either, or messages through the chat template.

Pure functions that any thread may call. The length of a prompt is judged by `frontend`, before text is tokenized
where its size alone shows that it is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.core.errors import InvalidRequest
from octavo.server.fields import Message, Part, parse
from octavo.server.generation import rename

if TYPE_CHECKING:
    from octavo.server.context import Context

MAX_PROMPTS = 1024
ROLES = ("system", "developer", "user", "assistant")

_RESERVED = frozenset(
    (
        *("self", "messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "raise_exception", "strftime_now"),
    )
)
"""What a template is given by the server itself, never through chat_template_kwargs."""

_text = msgspec.json.Decoder(str)
_texts = msgspec.json.Decoder(list[str])
_ids = msgspec.json.Decoder(list[int])
_id_lists = msgspec.json.Decoder(list[list[int]])


def completion_prompts(raw: msgspec.Raw, max_model_len: int) -> list[str | list[int]]:
    """The prompts of a completion request: a string, token ids, or a list of either.

    What cannot be served is refused by its count of brackets or commas, before millions of objects are made of it.
    """
    text = bytes(raw)
    head = b"".join(text[:64].split())
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


def chat_prompt(
    context: Context,
    messages: Sequence[msgspec.Raw],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    template_kwargs: dict[str, Any] | None,
) -> list[int]:
    """Token ids of `messages` as the chat template writes them."""
    template = context.backend.chat_template
    if template is None:
        raise InvalidRequest(
            "this server has no chat template: use /v1/completions or start it with --chat-template", "messages"
        )
    conversation = _conversation(messages, context.max_model_len)
    if continue_final_message:
        if add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes with add_generation_prompt false", "continue_final_message"
            )
        if conversation[-1]["role"] != "assistant":
            raise InvalidRequest(
                "continue_final_message needs an assistant message at the end", "continue_final_message"
            )
    kwargs = template_kwargs or {}
    for name in kwargs:
        if name in _RESERVED:
            raise InvalidRequest(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
    begin = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    try:
        text = template.render(
            conversation,
            add_generation_prompt=begin,
            continue_final_message=bool(continue_final_message),
            **kwargs,
        )
        return context.inputs.tokenize(text, add_special_tokens=bool(add_special_tokens))
    except InvalidRequest as error:
        raise rename(error, {"prompt": "messages"}) from None


def _conversation(messages: Sequence[msgspec.Raw], limit: int) -> list[dict[str, Any]]:
    """`messages` as a template wants them. Every message costs a token, so more than `limit` cannot fit."""
    if not messages:
        raise InvalidRequest("messages is empty: give at least one", "messages")
    if len(messages) > limit:
        raise InvalidRequest(f"{len(messages)} messages cannot fit in a context of {limit} tokens", "messages")
    return [_message(raw, f"messages[{i}]") for i, raw in enumerate(messages)]


def _message(raw: msgspec.Raw, where: str) -> dict[str, Any]:
    message = parse(Message, raw, f"{where}.")
    role = message.role
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role is {role[:100]!r}: it must be one of {', '.join(ROLES)}", f"{where}.role")
    if message.content is None and role != "assistant":
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    told = {"role": "system" if role == "developer" else role, "content": content}
    return told if message.name is None else told | {"name": message.name}


def _part(raw: msgspec.Raw, where: str) -> str:
    part = parse(Part, raw, f"{where}.")
    if part.type != "text":
        raise InvalidRequest(f"{where}.type is {part.type[:100]!r}: only text is supported", f"{where}.type")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is missing", f"{where}.text")
    return part.text
