"""POST /v1/completions: text or token ids in, their continuation out. Owns the shapes of this route alone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams, StructuredOutputs
from octavo.frontend.outputs import CompletionOutput, Position, RequestOutput
from octavo.server.constraints import request_constraint
from octavo.server.context import Context
from octavo.server.fields import CompletionRequest, sampling_fields
from octavo.server.generation import Job, respond
from octavo.server.logprobs import completion_logprobs, prompt_logprobs, shown
from octavo.server.prompts import completion_prompts
from octavo.server.table import parse
from octavo.server.wire import Completion, CompletionChoice, CompletionLogprobs, encode, sse

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 4096


async def completions(request: Request) -> Response:
    return await respond(request, prepare)


def prepare(context: Context, body: bytes) -> CompletionJob:
    request = parse(CompletionRequest, body)
    context.model_name(request.model)
    constraint, param = request_constraint(request)
    params = _params(context, request, constraint)
    if request.best_of not in (None, 1, params.n):
        raise InvalidRequest(f"best_of is {request.best_of}: only 1 and n, {params.n}, are supported", "best_of")
    prompts = completion_prompts(request.prompt, context.max_model_len)
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts x n {params.n} are more than {MAX_CHOICES} choices", "n")
    special = request.add_special_tokens is not False
    ids = [
        context.inputs.tokenize(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    texts = [_prompt_text(context, prompt) for prompt in prompts] if request.echo else []
    return CompletionJob(context, request, params, ids, texts, {"structured_outputs": param})


def _params(context: Context, request: CompletionRequest, constraint: StructuredOutputs | None) -> SamplingParams:
    """With `echo`, the prompt's logprobs are wanted too, and max_tokens 0, the prompt alone, computes one token."""
    given = sampling_fields(request) | {"logprobs": request.logprobs, "structured_outputs": constraint}
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        given["prompt_logprobs"] = request.logprobs
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if request.echo and max_tokens == 0:
        max_tokens = 1
    return context.backend.default_params(max_tokens, **given)


def _prompt_text(context: Context, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    tokenizer = context.backend.tokenizer
    if tokenizer is None:
        raise InvalidRequest("echo needs the tokenizer, which skip_tokenizer_init left out", "echo")
    return tokenizer.decode(prompt, skip_special_tokens=False, from_start=True)


class CompletionJob(Job):
    def __init__(
        self,
        context: Context,
        request: CompletionRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        texts: list[str],
        names: dict[str, str],
    ) -> None:
        super().__init__(context, request, params, prompts, "cmpl")
        self.renamed = names
        self.echo = texts
        """The prompts' texts, when they are to be returned."""
        self.prompt_only = request.max_tokens == 0
        self.wants_prompt_logprobs = request.prompt_logprobs is not None
        self._offsets: dict[int, int] = {}
        """Characters of tokens told so far, by index of the choices that have begun."""
        self._prompt_positions: dict[int, list[Position | None]] = {}

    def event(self, prompt: int, output: RequestOutput) -> bytes:
        choices = [self._choice(prompt, choice, output) for choice in output.outputs]
        told = [c for c in choices if c.text or c.finish_reason or c.token_ids or (c.logprobs and c.logprobs.tokens)]
        return sse(encode(self._completion(told, final=False))) if told else b""

    def last_event(self) -> bytes:
        return sse(encode(self._completion([], final=True))) if self.options.include_usage else b""

    def result(self, outputs: list[RequestOutput]) -> bytes:
        choices = [self._choice(p, choice, output) for p, output in enumerate(outputs) for choice in output.outputs]
        choices.sort(key=lambda choice: choice.index)
        return encode(self._completion(choices, final=True))

    def _completion(self, choices: list[CompletionChoice], *, final: bool) -> Completion:
        completion = Completion(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.fingerprint, choices=choices
        )
        if final or self.options.continuous_usage_stats:
            completion.usage = self.usage()
        elif self.options.include_usage:
            completion.usage = None
        return completion

    def _choice(self, prompt: int, output: CompletionOutput, whole: RequestOutput) -> CompletionChoice:
        index = prompt * self.params.n + output.index
        first = index not in self._offsets
        choice = CompletionChoice(
            index=index,
            text="" if self.prompt_only else output.text,
            logprobs=self._logprobs(prompt, index, first, output, whole),
            finish_reason="length" if self.prompt_only else output.finish_reason,
            stop_reason=None if self.prompt_only else output.stop_reason,
        )
        if first and self.echo:
            choice.text = self.echo[prompt] + choice.text
        if self.wants_prompt_logprobs:
            choice.prompt_logprobs = prompt_logprobs(whole.prompt_logprobs)
        if self.return_token_ids:
            choice.token_ids = [] if self.prompt_only else output.token_ids
            if first:
                choice.prompt_token_ids = self.prompts[prompt]
        return choice

    def _logprobs(
        self, prompt: int, index: int, first: bool, output: CompletionOutput, whole: RequestOutput
    ) -> CompletionLogprobs | None:
        """Those of the tokens told now; with echo a choice begins with the prompt's."""
        positions = shown(output, self.params)
        offset, first_text = self._offsets.setdefault(index, 0), ""
        if positions is None:
            return None
        told: list[Position | None] = [] if self.prompt_only else [*positions]
        if first and self.echo:
            told, first_text = [*self._echoed(prompt, whole), *told], self._token_text(self.prompts[prompt][0])
        lists, self._offsets[index] = completion_logprobs(told, offset, first_text, as_ids=self.tokens_as_ids)
        return lists

    def _echoed(self, prompt: int, whole: RequestOutput) -> list[Position | None]:
        """The prompt's positions, kept for the choices that begin later: a stream brings them once."""
        if whole.prompt_logprobs is not None:
            self._prompt_positions[prompt] = whole.prompt_logprobs
        return self._prompt_positions[prompt]

    def _token_text(self, token: int) -> str:
        if self.tokens_as_ids:
            return f"token_id:{token}"
        assert self.tokenizer is not None, "echo was refused without a tokenizer"
        return self.tokenizer.token_text(token)
