"""Chat messages to prompt text through a model's jinja template, with the conventions of Hugging Face's templates.

Owns the sandbox in which templates run and its limits: a template comes with a model, messages come from anyone. Which
roles make sense is left to the template, tokenizing to the caller (special tokens parsed, none added).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARS = 64 * 2**20
MAX_RENDER_SECONDS = 10.0

_TEXT_PARTS = ("text", "input_text", "output_text")
_CONTINUE = "<octavo-continues-here> "
"""Marks the end of the message to continue; its space shows whether the template trims what follows the text."""


def normalise_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them, copied: content is text, arguments of tool calls are objects.

    A list of text parts becomes their lines. Raises InvalidRequest for parts of any other kind.
    """
    return [_normalise(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalise(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a role", "messages")
    plain = {**message, "content": _content(message.get("content"), where)}
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise InvalidRequest(f"{where}.tool_calls must be a list of objects", "messages")
        plain["tool_calls"] = [_tool_call(call) for call in calls]
    return plain


def _content(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where}.content must be text or a list of parts", "messages")
    texts: list[str] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") not in _TEXT_PARTS:
            raise InvalidRequest(f"{where} has a part of type {part['type']!r}; only text is supported", "messages")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise InvalidRequest(f"{where} has a part without text", "messages")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Clients send arguments as JSON text; templates print them as an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


class ChatTemplate:
    """A compiled template. Raises ConfigError when `source` is no valid jinja."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        import jinja2

        self._special_tokens = dict(tokenizer.special_tokens)
        try:
            self._template: jinja2.Template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. `kwargs` are variables of the template.

        `continue_final_message` ends the prompt with the text of the last message, so that the model continues it.
        Raises InvalidRequest when the template rejects the messages, fails, or exceeds the limits.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
                "continue_final_message",
            )
        chat = [dict(message) for message in messages]
        text = self._run(
            {
                **self._special_tokens,
                "documents": None,
                **kwargs,
                "messages": _marked(chat) if continue_final_message else chat,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, variables: dict[str, Any]) -> str:
        import jinja2

        deadline = time.monotonic() + MAX_RENDER_SECONDS
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(variables):
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise _refused(f"its output exceeds {MAX_PROMPT_CHARS} characters")
                if time.monotonic() > deadline:
                    raise _refused(f"it runs for more than {MAX_RENDER_SECONDS} s")
                parts.append(part)
        except InvalidRequest:
            raise
        except Exception as error:  # a template is foreign code and raises what it likes
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise _refused(f"{kind}{error}") from error
        return "".join(parts)


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the chat template cannot render these messages: {reason}", "messages")


def _marked(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with a mark after the text of its last message."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        return [*chat[:-1], {**chat[-1], "content": content + _CONTINUE}]
    raise InvalidRequest("continue_final_message needs a last message whose content is text", "messages")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE.rstrip())
    if at < 0:
        raise _refused("it leaves out the end of the message to continue")
    trimmed = not text.startswith(_CONTINUE, at)
    return text[:at].rstrip() if trimmed else text[:at]


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox: blocks trimmed as in transformers, JSON without HTML escapes, products of bounded size."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if _too_large(operator, left, right):
                raise jinja2.TemplateError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _too_large(operator: str, left: Any, right: Any) -> bool:
    """True for repetitions beyond the prompt's limit and powers beyond any use."""
    if operator == "**":
        return bool(abs(right) > 64)
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sequence):
            return bool(len(value) * times > MAX_PROMPT_CHARS)
    return False


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
