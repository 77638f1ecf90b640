"""A chat answer from the text of one choice: content, reasoning and tool calls, told in pieces or whole.

Both are made of the same events of the same parser. Owns what of them is told, and the ids of calls.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.frontend.outputs import CompletionOutput
from octavo.server.thinking import Thinking
from octavo.server.tools import Tools
from octavo.server.wire import CalledFunction, ChatDelta, ChatMessage, FunctionDelta, ToolCallDelta
from octavo.server.wire import ToolCall as WireCall
from octavo.text import Tokenizer
from octavo.text.parsing import (
    TOOL_FORMATS,
    Arguments,
    Content,
    Event,
    Formats,
    OutputParser,
    Reasoning,
    ToolCall,
    build_parser,
    merged,
)

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Reading:
    """How the text of a request's answers is read."""

    formats: Formats
    tools: Tools | None
    in_reasoning: bool
    """The prompt ends within reasoning, so the answer begins there."""
    include_reasoning: bool

    def parser(self) -> OutputParser:
        tools = [] if self.tools is None else self.tools.told
        constrained = self.tools is not None and self.tools.constrained
        return build_parser(self.formats, tools, in_reasoning=self.in_reasoning, call="json" if constrained else "auto")

    def thinking(self, tokenizer: Tokenizer) -> Thinking:
        return Thinking(self.formats, self.in_reasoning, tokenizer)

    def call_id(self) -> str:
        """Mistral's templates take no ids but theirs."""
        tool = self.formats.tool
        if tool is not None and TOOL_FORMATS[tool].name == "mistral":
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class Answer:
    """One choice. Either every output goes through `deltas`, or the only one through `message`."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parser = reading.parser()
        self._called = False

    def deltas(self, output: CompletionOutput) -> list[ChatDelta]:
        """What `output` has new, one delta for each kind of it; no delta is empty."""
        return [self._delta(event) for event in self._read(output)]

    def message(self, output: CompletionOutput) -> ChatMessage:
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[WireCall] = []
        for event in self._read(output):
            match event:
                case Content(text):
                    content.append(text)
                case Reasoning(text):
                    reasoning.append(text)
                case ToolCall(_, name):
                    calls.append(WireCall(id=self._reading.call_id(), function=CalledFunction(name=name, arguments="")))
                case Arguments(index, text):
                    calls[index].function.arguments += text
        silent = not content and (reasoning or calls)
        message = ChatMessage(content=None if silent else "".join(content))
        if reasoning:
            message.reasoning = "".join(reasoning)
        if calls:
            message.tool_calls = calls
        return message

    def finish_reason(self, output: CompletionOutput) -> str | None:
        """A named choice ends with "stop", as OpenAI's does: the client knows that the call is there."""
        tools = self._reading.tools
        if self._called and output.finish_reason == "stop" and tools is not None and tools.choice != "named":
            return "tool_calls"
        return output.finish_reason

    def _read(self, output: CompletionOutput) -> Sequence[Event]:
        events = self._parser.push(output.text)
        if output.finished:
            events += self._parser.finish()
        told = [event for event in merged(events) if self._is_told(event)]
        self._called = self._called or any(isinstance(event, ToolCall) for event in told)
        return told

    def _is_told(self, event: Event) -> bool:
        """A constrained answer is calls: what its end cuts off of the next one is told to nobody."""
        match event:
            case Content():
                return self._reading.tools is None or not self._reading.tools.constrained
            case Reasoning():
                return self._reading.include_reasoning
            case ToolCall(index) | Arguments(index):
                return index == 0 or self._reading.tools is None or not self._reading.tools.single

    def _delta(self, event: Event) -> ChatDelta:
        match event:
            case Content(text):
                return ChatDelta(content=text)
            case Reasoning(text):
                return ChatDelta(reasoning=text)
            case ToolCall(index, name):
                function = FunctionDelta(name=name, arguments="")
                call = ToolCallDelta(index=index, id=self._reading.call_id(), type="function", function=function)
                return ChatDelta(tool_calls=[call])
            case Arguments(index, text):
                return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=FunctionDelta(arguments=text))])
