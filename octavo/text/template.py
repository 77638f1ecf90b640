"""A model's chat template: which of several it is, what it reads, and how it is run.

Owns the conventions of Hugging Face's templates (their variables and filters) and the cache of compiled ones. Limits
are sandbox.py's, the form of messages is messages.py's, control tokens in what clients send are shield.py's.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text.messages import Manners, Message, fitted, tools_text, with_tools_told
from octavo.text.shield import Shield
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes

    from octavo.text.sandbox import Limits

MAX_FOREIGN_CHARS = 2**15
"""Longest template that a request may bring."""
MAX_FOREIGN_TOKENS = 5000
"""Most names, operators and literals in it: compiling takes 0.1 ms for each."""
_MAX_REASON = 500

RESERVED = frozenset(
    (
        *("self", "messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens", "return_dict", "return_tensors"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("raise_exception", "strftime_now", "namespace", "range", "dict", "cycler", "joiner"),
    )
)
"""Variables that a template is given by its caller, never by a client."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template writes it."""

    text: str
    marked: str | None = None
    """`text` with the template's control tokens as the tokenizer's marks, where it has others that are only text."""


class ChatTemplate:
    """Templates by name, or one, for the vocabulary of `tokenizer`.

    Of several, "tool_use" is taken when there are tools, else "default". Raises ConfigError when one is no valid jinja
    or there is none to take.
    """

    def __init__(self, source: str | Mapping[str, str], tokenizer: Tokenizer, *, limits: Limits | None = None) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise ConfigError(f"no chat template is called default, only {', '.join(sources) or 'none at all'}")
        self._compiled = {name: _compile(text) for name, text in sources.items() if name in ("default", "tool_use")}
        self._sources = sources
        self._tokenizer = tokenizer
        self._limits = limits

    @classmethod
    def foreign(cls, source: str, tokenizer: Tokenizer) -> ChatTemplate:
        """A template that came with a request: with tighter limits. Raises InvalidRequest (chat_template)."""
        from octavo.text.sandbox import FOREIGN

        if len(source) > MAX_FOREIGN_CHARS:
            raise InvalidRequest(
                f"chat_template has {len(source)} characters, more than {MAX_FOREIGN_CHARS}: shorten it",
                "chat_template",
            )
        try:
            _check_tokens(source)
            return cls(source, tokenizer, limits=FOREIGN)
        except ConfigError as error:
            raise InvalidRequest(_shortened(str(error)), "chat_template") from None

    @property
    def source(self) -> str:
        """The template that is taken when there are tools."""
        return self._sources[self._name(True)]

    def uses(self, variable: str) -> bool:
        """True when some of the templates reads `variable`."""
        return any(variable in compiled.manners.variables for compiled in self._compiled.values())

    def _name(self, tools: bool) -> str:
        return "tool_use" if tools and "tool_use" in self._compiled else "default"

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of `rendered`, which has the same options."""
        return self.rendered(messages, **options).text

    def rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Rendered:
        """The prompt of normalised `messages`. `kwargs` are variables of the template.

        `continue_final_message` ends the prompt with the text of the last message, so that the model continues it.
        Raises InvalidRequest when the template rejects the messages, fails, or exceeds the limits, and for a name in
        `kwargs` that is the caller's.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
                "continue_final_message",
            )
        check_names(kwargs)
        try:
            return self._rendered(
                messages, tools or None, documents, kwargs, add_generation_prompt, continue_final_message
            )
        except RecursionError:
            raise self._refused("they are nested too deeply") from None

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        begin: bool,
        go_on: bool,
    ) -> Rendered:
        name = self._name(tools is not None)
        shield = Shield(self._tokenizer)
        chat = self._fitted(messages, tools, name)
        given = shield.over({**kwargs, "messages": chat, "tools": tools, "documents": documents})
        given["add_generation_prompt"] = begin
        if not go_on:
            return Rendered(*shield.removed(self._run(name, given)))
        mark = f"\U0010f800{secrets.token_hex(8)}"
        given["messages"] = _marked(given["messages"], mark + " ")
        return Rendered(*shield.removed(self._cut(self._run(name, given), mark)))

    def encode(self, rendered: Rendered, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids: control tokens are those that the template wrote. A bos token that it wrote is not doubled."""
        tokenizer = self._tokenizer
        if rendered.marked is None:
            ids = tokenizer.encode(rendered.text, add_special_tokens=add_special_tokens)
        else:
            ids = tokenizer.encode_marked(rendered.marked, add_special_tokens=add_special_tokens)
        bos = tokenizer.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    def _fitted(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, name: str
    ) -> list[Message]:
        manners = self._compiled[name].manners
        chat = [dict(message) for message in messages]
        if tools is not None and not manners.tools:
            text = tools_text(tools, form=not manners.calls)
            chat = with_tools_told(chat, text, system=self._knows_system)
        return fitted(chat, manners)

    @cached_property
    def _knows_system(self) -> bool:
        """It prints a system message, tried on a short conversation."""
        mark = secrets.token_hex(8)
        chat = fitted(
            [{"role": "system", "content": mark}, {"role": "user", "content": "Hi"}], self._compiled["default"].manners
        )
        try:
            return mark in self._run("default", {"messages": chat, "tools": None, "add_generation_prompt": True})
        except InvalidRequest:
            return False

    def _run(self, name: str, variables: dict[str, Any]) -> str:
        import jinja2

        from octavo.text import sandbox

        try:
            return sandbox.render(
                self._compiled[name].template,
                {"documents": None, **variables, **self._tokenizer.special_tokens},
                self._limits or sandbox.OWN,
            )
        except Exception as error:  # a template is foreign code and raises what it likes
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise self._refused(f"{kind}{error}") from error

    def _refused(self, reason: str) -> InvalidRequest:
        return InvalidRequest(
            f"the chat template cannot render these messages: {_shortened(reason)}",
            "messages" if self._limits is None else "chat_template",
        )

    def _cut(self, text: str, mark: str) -> str:
        """`text` up to the mark, whose space shows whether the template trims what follows the message's text."""
        at = text.rfind(mark)
        if at < 0:
            raise self._refused("it leaves out the end of the message to continue")
        trimmed = not text.startswith(mark + " ", at)
        return text[:at].rstrip() if trimmed else text[:at]


def model_template(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The chat template that came with a vocabulary."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer.chat_templates, tokenizer)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def check_names(kwargs: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a name in chat_template_kwargs that is not a client's to set."""
    for name in kwargs:
        if name in RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {name!r}: it is the server's", "chat_template_kwargs"
            )


def _marked(chat: list[Message], mark: str) -> list[Message]:
    """The chat with a mark after the text of its last message."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, list) and content:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]
    elif isinstance(content, str):
        content += mark
    else:
        raise InvalidRequest("continue_final_message needs a last message whose content is text", "messages")
    return [*chat[:-1], {**chat[-1], "content": content}]


@dataclass(frozen=True)
class _Compiled:
    template: jinja2.Template
    manners: Manners


@lru_cache(maxsize=32)
def _compile(source: str) -> _Compiled:
    """Raises ConfigError for a source that is no template."""
    import jinja2

    try:
        environment = _environment()
        tree = environment.parse(source)
        manners = _manners(tree)
        return _Compiled(environment.compiled(tree), manners)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
    except Exception as error:  # of Python's own compiler, for what is nested too deeply
        raise ConfigError(f"the chat template does not compile: {type(error).__name__}: {error}") from error


def _check_tokens(source: str) -> None:
    """Raises ConfigError beyond MAX_FOREIGN_TOKENS. What is no template is for `_compile` to refuse."""
    import jinja2

    try:
        tokens = (kind for _, kind, _ in _environment().lex(source) if kind not in ("whitespace", "data"))
        more = any(islice(tokens, MAX_FOREIGN_TOKENS, None))
    except jinja2.TemplateSyntaxError:
        return
    if more:
        raise ConfigError(f"the chat template has more than {MAX_FOREIGN_TOKENS} names, operators and literals")


def _manners(tree: nodes.Template) -> Manners:
    from jinja2 import meta, nodes

    contents = _contents(tree)
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    words = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return Manners(
        variables=frozenset(meta.find_undeclared_variables(tree)),
        parts=any(_is_content(loop.iter, contents) for loop in tree.find_all(nodes.For)),
        text=any(test.name == "string" and _is_content(test.node, contents) for test in tree.find_all(nodes.Test)),
        calls="tool_calls" in names | words,
        developer="developer" in words,
    )


def _contents(tree: nodes.Template) -> frozenset[str]:
    """Names that stand for a message's content: set from one, or parameters of a macro that is given one."""
    from jinja2 import nodes

    found: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for _ in range(2):  # a content may be handed on once
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, found):
                found.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                found.update(
                    name.name for name, value in zip(macro.args, call.args, strict=False) if _is_content(value, found)
                )
    return frozenset(found)


def _is_content(node: nodes.Node, names: frozenset[str] | set[str]) -> bool:
    """True for `message.content` and `message['content']`, whatever filters follow, and for one of `names`."""
    from jinja2 import nodes

    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The sandbox with what transformers gives to templates: JSON without HTML escapes, errors, the date."""
    from octavo.text.sandbox import Environment

    environment = Environment()
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


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
