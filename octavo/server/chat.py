"""POST /v1/chat/completions: messages in, the assistant's message out. Owns the shapes of this route alone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams
from octavo.frontend.outputs import CompletionOutput, RequestOutput
from octavo.server.context import Context
from octavo.server.fields import ChatRequest, parse, sampling_fields
from octavo.server.generation import Job, rename, respond
from octavo.server.logprobs import chat_logprobs, prompt_logprobs, shown
from octavo.server.prompts import chat_prompt
from octavo.server.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    encode,
    sse,
)


async def chat_completions(request: Request) -> Response:
    return await respond(request, prepare)


def prepare(context: Context, body: bytes) -> ChatJob:
    request = parse(ChatRequest, body)
    context.model_name(request.model)
    params = _params(context, request)
    prompt = chat_prompt(
        context,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=request.add_special_tokens,
        template_kwargs=request.chat_template_kwargs,
    )
    return ChatJob(context, request, params, prompt)


def _params(context: Context, request: ChatRequest) -> SamplingParams:
    given = sampling_fields(request) | {"logprobs": _num_logprobs(request)}
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")
    names = _names(request)
    try:
        return context.backend.default_params(_max_tokens(request), **given)
    except InvalidRequest as error:
        raise rename(error, names) from None


def _names(request: ChatRequest) -> dict[str, str]:
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
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
    def __init__(self, context: Context, request: ChatRequest, params: SamplingParams, prompt: list[int]) -> None:
        super().__init__(context, request, params, [prompt], "chatcmpl")
        self.renamed = _names(request)
        self._begun: set[int] = set()
        """Choices whose role has been told."""

    def event(self, prompt: int, output: RequestOutput) -> bytes:
        return b"".join(self._chunks(choice) for choice in output.outputs)

    def _chunks(self, output: CompletionOutput) -> bytes:
        """The role before a choice's first news, then its text, then its end: a chunk each."""
        chunks = []
        if output.index not in self._begun:
            self._begun.add(output.index)
            opening = self._chunk(output.index, ChatDelta("assistant", ""))
            if self.return_token_ids:
                opening.prompt_token_ids = self.prompts[0]
            chunks.append(opening)
        logprobs = self._logprobs(output)
        if output.text or (logprobs and logprobs.content) or (self.return_token_ids and output.token_ids):
            chunk = self._chunk(output.index, ChatDelta(content=output.text))
            chunk.choices[0].logprobs = logprobs
            if self.return_token_ids:
                chunk.choices[0].token_ids = output.token_ids
            chunks.append(chunk)
        if output.finish_reason is not None:
            chunk = self._chunk(output.index, ChatDelta())
            chunk.choices[0].finish_reason = output.finish_reason
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
        choice = ChatChoice(
            index=output.index,
            message=ChatMessage(content=output.text),
            logprobs=self._logprobs(output),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if self.return_token_ids:
            choice.token_ids = output.token_ids
        return choice

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        positions = shown(output, self.params)
        if positions is None:
            return None
        return chat_logprobs(positions, self.params.logprobs or 0, self.tokenizer)
