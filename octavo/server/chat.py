"""POST /v1/chat/completions: messages in, the assistant's message out. Owns the shapes of this route alone."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams, StructuredOutputs
from octavo.frontend.outputs import CompletionOutput, RequestOutput
from octavo.server.answer import Answer, Reading
from octavo.server.constraints import request_constraint
from octavo.server.context import Context
from octavo.server.errors import rename
from octavo.server.fields import ChatRequest, sampling_fields
from octavo.server.generation import Job, respond
from octavo.server.logprobs import chat_logprobs, prompt_logprobs, shown
from octavo.server.prompts import chat_prompt, template_of
from octavo.server.table import parse
from octavo.server.thinking import Thinking
from octavo.server.tools import Tools, request_tools
from octavo.server.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    CompletionTokensDetails,
    Usage,
    encode,
    sse,
)
from octavo.text import ChatPrompt, ChatTemplate
from octavo.text.parsing import starts_in_reasoning

T = TypeVar("T")


async def chat_completions(request: Request) -> Response:
    return await respond(request, prepare)


def prepare(context: Context, body: bytes) -> ChatJob:
    request = parse(ChatRequest, body)
    context.model_name(request.model)
    tools = request_tools(request)
    constraint, param = _constraint(request, tools)
    names = _names(request, param)
    params = _params(context, request, constraint, names)
    template = template_of(context, request.chat_template)
    prompt = chat_prompt(
        context,
        template,
        request.messages,
        tools=None if tools is None else tools.told,
        documents=_documents(request, template),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=request.add_special_tokens,
        template_kwargs=_template_kwargs(request, template),
    )
    reading = _reading(context, request, tools, template, prompt)
    if constraint is not None:
        calls = () if tools is None or tools.constrained else [function["name"] for function in tools.functions]
        lead = context.formats.lead(reading.formats, prompt.tail, calls)
        params = params.replace(structured_outputs=msgspec.structs.replace(constraint, lead=lead))
    return ChatJob(context, request, params, prompt.ids, names, reading)


def _constraint(request: ChatRequest, tools: Tools | None) -> tuple[StructuredOutputs | None, str]:
    """What the answer must look like, and the field that says so."""
    constraint, param = request_constraint(request)
    if tools is None or not tools.constrained:
        return constraint, param
    if constraint is not None:
        raise InvalidRequest(
            f"{param} has nothing to constrain: with this tool_choice the answer is a call; set tool_choice to auto",
            param,
        )
    tools.check()
    return StructuredOutputs(json=tools.schema()), tools.param


def _reading(
    context: Context, request: ChatRequest, tools: Tools | None, template: ChatTemplate, prompt: ChatPrompt
) -> Reading:
    formats = context.formats.of(template.source, tools=tools is not None)
    return Reading(
        formats=formats,
        tools=tools,
        in_reasoning=starts_in_reasoning(formats, prompt.tail),
        include_reasoning=request.include_reasoning is not False,
    )


def _documents(request: ChatRequest, template: ChatTemplate) -> list[dict[str, Any]] | None:
    if request.documents and not template.uses("documents"):
        raise _unread("documents")
    return request.documents


def _template_kwargs(request: ChatRequest, template: ChatTemplate) -> dict[str, Any]:
    """The client's, and what `reasoning_effort` means to the template: some know only whether to think."""
    given, effort = request.chat_template_kwargs or {}, request.reasoning_effort
    if effort is None:
        return given
    if template.uses("reasoning_effort"):
        meant: dict[str, Any] = {"reasoning_effort": effort}
    elif effort == "none" and template.uses("enable_thinking"):
        meant = {"enable_thinking": False}
    else:
        raise _unread("reasoning_effort")
    for name, value in meant.items():
        if given.get(name, value) != value:
            raise InvalidRequest(f"reasoning_effort and chat_template_kwargs differ about {name}", "reasoning_effort")
    return given | meant


def _unread(name: str) -> InvalidRequest:
    return InvalidRequest(f"this model's chat template does not read {name}: leave it out", name)


def _params(
    context: Context, request: ChatRequest, constraint: StructuredOutputs | None, names: dict[str, str]
) -> SamplingParams:
    given = sampling_fields(request) | {"logprobs": _num_logprobs(request), "structured_outputs": constraint}
    try:
        return context.backend.default_params(_max_tokens(request), **given)
    except InvalidRequest as error:
        raise rename(error, names) from None


def _names(request: ChatRequest, constraint: str) -> dict[str, str]:
    names = {"logprobs": "top_logprobs", "prompt": "messages", "structured_outputs": constraint}
    return names if request.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}


def _num_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens is {old} and max_completion_tokens {new}: give one of them", "max_completion_tokens"
        )
    return old if new is None else new


class ChatJob(Job):
    def __init__(
        self,
        context: Context,
        request: ChatRequest,
        params: SamplingParams,
        prompt: list[int],
        names: dict[str, str],
        reading: Reading,
    ) -> None:
        super().__init__(context, request, params, [prompt], "chatcmpl")
        self.renamed = names
        self.shown = context.formats.shown(reading.formats)
        self.reading = reading
        self._answers: dict[int, Answer] = {}
        """Of the choices that have begun."""
        self._thinking: dict[int, Thinking] = {}
        self._hidden: dict[int, list[bool]] = {}
        """By choice, the tokens of the output at hand that are reasoning."""
        self._reasoned = 0

    def count(self, prompt: int, output: RequestOutput) -> None:
        super().count(prompt, output)
        assert self.tokenizer is not None, "chat was refused without a tokenizer"
        for choice in output.outputs:
            if choice.index not in self._thinking:
                self._thinking[choice.index] = self.reading.thinking(self.tokenizer)
            hidden = self._hidden[choice.index] = self._thinking[choice.index].push(choice.token_ids)
            self._reasoned += sum(hidden)

    def usage(self) -> Usage:
        usage = super().usage()
        usage.completion_tokens_details = CompletionTokensDetails(self._reasoned)
        return usage

    def _told(self, output: CompletionOutput, items: list[T]) -> list[T]:
        """Of `items`, which belong to the tokens of `output`, those that the client is told."""
        if self.reading.include_reasoning:
            return items
        return [item for item, hidden in zip(items, self._hidden[output.index], strict=False) if not hidden]

    def event(self, prompt: int, output: RequestOutput) -> bytes:
        return b"".join(self._chunks(choice) for choice in output.outputs)

    def _chunks(self, output: CompletionOutput) -> bytes:
        """The role before a choice's first news, then its news, then its end: a chunk each."""
        chunks = []
        answer = self._answers.get(output.index)
        if answer is None:
            answer = self._answers[output.index] = Answer(self.reading)
            opening = self._chunk(output.index, ChatDelta(role="assistant", content=""))
            if self.return_token_ids:
                opening.prompt_token_ids = self.prompts[0]
            chunks.append(opening)
        news = [self._chunk(output.index, delta) for delta in answer.deltas(output)]
        logprobs = self._logprobs(output)
        token_ids = self._told(output, output.token_ids)
        if not news and ((logprobs and logprobs.content) or (self.return_token_ids and token_ids)):
            news.append(self._chunk(output.index, ChatDelta(content="")))
        if news:
            news[0].choices[0].logprobs = logprobs
            if self.return_token_ids:
                news[0].choices[0].token_ids = token_ids
        chunks += news
        if output.finish_reason is not None:
            chunk = self._chunk(output.index, ChatDelta())
            chunk.choices[0].finish_reason = answer.finish_reason(output)
            chunk.choices[0].stop_reason = output.stop_reason
            chunks.append(chunk)
        return b"".join(sse(encode(chunk)) for chunk in chunks)

    def _chunk(self, index: int, delta: ChatDelta) -> ChatChunk:
        chunk = self._empty_chunk()
        chunk.choices.append(ChatChunkChoice(index=index, delta=delta))
        if self.options.continuous_usage_stats:
            chunk.usage = self.usage()
        elif self.options.include_usage:
            chunk.usage = None
        return chunk

    def _empty_chunk(self) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.fingerprint, choices=[]
        )

    def last_event(self) -> bytes:
        if not self.options.include_usage:
            return b""
        chunk = self._empty_chunk()
        chunk.usage = self.usage()
        return sse(encode(chunk))

    def result(self, outputs: list[RequestOutput]) -> bytes:
        (output,) = outputs
        completion = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(choice) for choice in sorted(output.outputs, key=lambda choice: choice.index)],
            usage=self.usage(),
        )
        if self.params.prompt_logprobs is not None:
            completion.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        if self.return_token_ids:
            completion.prompt_token_ids = self.prompts[0]
        return encode(completion)

    def _choice(self, output: CompletionOutput) -> ChatChoice:
        answer = Answer(self.reading)
        choice = ChatChoice(
            index=output.index,
            message=answer.message(output),
            logprobs=self._logprobs(output),
            finish_reason=answer.finish_reason(output),
            stop_reason=output.stop_reason,
        )
        if self.return_token_ids:
            choice.token_ids = self._told(output, output.token_ids)
        return choice

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        positions = shown(output, self.params)
        if positions is None:
            return None
        positions = self._told(output, positions)
        return chat_logprobs(positions, self.params.logprobs or 0, self.tokenizer, as_ids=self.tokens_as_ids)
