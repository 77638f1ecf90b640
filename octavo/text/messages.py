"""Messages as chat templates expect them, after the conventions of Hugging Face's templates.

Owns the checks of what `LLM.chat` is given, and how a conversation is fitted to a template that reads contents in one
form only or knows no tools. Running templates is template.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.core.errors import InvalidRequest

Message = dict[str, Any]

_TEXT_PARTS = ("text", "input_text", "output_text")


class Arguments(dict[str, Any]):
    """Arguments of a call: an object for templates that print it with tojson, its JSON for those that want text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: object) -> str:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented


def normalise_messages(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages as templates expect them, copied: arguments of calls are objects, reasoning goes by all of its names.

    Content is text or a list of parts `{"type": "text", "text": ...}`. Raises InvalidRequest for parts of any other
    kind and for what is no message.
    """
    return [_normalise(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalise(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a role", "messages")
    plain = {**message, "content": _content(message.get("content"), where)}
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise InvalidRequest(f"{where}.tool_calls must be a list of objects", "messages")
        plain["tool_calls"] = [_tool_call(call) for call in calls]
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if isinstance(reasoning, str):
        plain |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls and not plain["content"]:
            plain["thinking"] = reasoning  # gpt-oss, which refuses it beside content
    return plain


def _content(content: object, where: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where}.content must be text or a list of parts", "messages")
    parts: list[dict[str, str]] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") not in _TEXT_PARTS:
            raise InvalidRequest(f"{where} has a part of type {part['type']!r}; only text is supported", "messages")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise InvalidRequest(f"{where} has a part without text", "messages")
        parts.append({"type": "text", "text": text})
    return parts


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Clients send arguments as JSON text; what is none stays text."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return dict(call)
    if isinstance(arguments, Mapping):
        return {**call, "function": {**function, "arguments": Arguments(arguments)}}
    return dict(call)


@dataclass(frozen=True)
class Manners:
    """What a template makes of a conversation, as its syntax tree shows it."""

    variables: frozenset[str]
    """What it reads of its arguments."""
    parts: bool
    """It goes through the parts of a content."""
    text: bool
    """It tells a content that is text from one in parts."""
    calls: bool
    """It prints the calls of an assistant."""
    developer: bool
    """It knows the role."""

    @property
    def tools(self) -> bool:
        """It prints the tools that it is given."""
        return "tools" in self.variables


def fitted(messages: Sequence[Message], manners: Manners) -> list[Message]:
    """The messages in the form that the template reads; the text of content does not change.

    For a template that knows neither tools nor calls, both are text in the form of Hermes.
    """
    shaped = [_shaped(message, manners) for message in messages]
    return shaped if manners.tools or manners.calls else _calls_as_text(shaped)


def _shaped(message: Message, manners: Manners) -> Message:
    content = message.get("content")
    if not manners.parts and isinstance(content, list):
        message = {**message, "content": text_of(content)}
    elif manners.parts and not manners.text and isinstance(content, str):
        message = {**message, "content": [{"type": "text", "text": content}]}
    if message.get("role") == "developer" and not manners.developer:
        message = {**message, "role": "system"}
    return message


def text_of(content: str | list[dict[str, str]]) -> str:
    """Content as one text, its parts as lines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_text(message: Message, text: str) -> Message:
    """`message` with `text` for content, in the form that its content has."""
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Calls follow the assistant's text; results are told by the user, in one message with what follows of the user's.

    So the roles still take turns, as many templates want it.
    """
    told: list[Message] = []
    last = ""
    for message in messages:
        role, calls = message.get("role"), message.get("tool_calls")
        text = text_of(message.get("content") or "")
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
        if last == "tool" and role in ("tool", "user"):
            told[-1] = _with_text(told[-1], f"{text_of(told[-1]['content'])}\n{text}")
        elif role == "tool":
            told.append(_with_text({"role": "user", "content": message.get("content")}, text))
        elif calls:
            bare = {key: value for key, value in message.items() if key != "tool_calls"}
            lines = [text, *map(_call_text, calls)]
            told.append(_with_text(bare, "\n".join(line for line in lines if line)))
        else:
            told.append(message)
        last = str(role)
    return told


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else call
    body = {"name": function.get("name"), "arguments": function.get("arguments") or {}}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def tools_text(tools: Sequence[Mapping[str, Any]], *, form: bool) -> str:
    """What a model is told of its tools where the template does not; with `form` also how to call them (Hermes)."""
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = (
        "You may call functions to answer. They are, each as JSON with a JSON Schema of its arguments:\n"
        f"<tools>\n{functions}\n</tools>"
    )
    if not form:
        return text
    return text + (
        "\nTo call one, answer with its name and arguments as JSON within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": "the name", "arguments": {"an argument": "its value"}}\n</tool_call>\n'
        "Results come within <tool_response></tool_response>."
    )


def with_tools_told(messages: Sequence[Message], text: str, *, system: bool) -> list[Message]:
    """The conversation with `text` in its system message or, without `system`, before its first message's text.

    A template that prints no system message has `text` in the first of the user's.
    """
    head = [*messages]
    wanted = ("system", "developer") if system else ("user",)
    at = next((i for i, message in enumerate(head) if message.get("role") in wanted), None)
    if at is None:
        return [{"role": wanted[0], "content": text}, *head]
    old = text_of(head[at].get("content") or "")
    texts = (old, text) if system else (text, old)
    head[at] = _with_text(head[at], "\n\n".join(part for part in texts if part))
    return head
