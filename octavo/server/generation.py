"""Any route that generates: prompts in, one response or a stream out.

A route supplies a `Job`: what to generate, and how to present it. Owns how the generations of several prompts are
run side by side and end together, and how an error becomes a status or, once a stream has begun, an event.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import InvalidRequest, OctavoError
from octavo.core.params import SamplingParams
from octavo.frontend.outputs import RequestOutput
from octavo.server.context import Context, context_of
from octavo.server.errors import GenerationFailed, rename
from octavo.server.exchange import EventStream, error_event, offload, read_body, while_connected
from octavo.server.fields import GenerationRequest, StreamOptions
from octavo.server.table import parse
from octavo.server.wire import PromptTokensDetails, Usage

logger = logging.getLogger(__name__)

MAX_LISTED = 2**19
"""Most log-probabilities of prompts in one answer: 26 MB of JSON, made in 1 to 2 s (a shared CPU core)."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Job(ABC):
    """One validated HTTP request. `prompts` are token ids; prompt p has the choices p*n to p*n + n-1."""

    renamed: Mapping[str, str] = {}
    """Sampling parameters and prompt whose errors are reported under the route's own name."""

    def __init__(
        self,
        context: Context,
        request: GenerationRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        prefix: str,
    ) -> None:
        self.id = f"{prefix}-{_request_id(request)}"
        self.created = int(time.time())
        self.model = context.model_name(request.model)
        self.fingerprint = context.fingerprint
        self.tokenizer = context.backend.tokenizer
        self.params = params
        self.prompts = prompts
        self.stream = bool(request.stream)
        self.options = _stream_options(request)
        self.cache_salt = request.cache_salt or ""
        _check_prompt_logprobs(request, params, prompts)
        self.return_token_ids = bool(request.return_token_ids)
        self.tokens_as_ids = bool(request.return_tokens_as_token_ids)
        self.shown: frozenset[int] = frozenset()
        """Control tokens that stay in the text."""
        self.prompt_only = False
        """What is generated is neither told nor counted."""
        self._generated = 0
        self._cached = [0] * len(prompts)

    def count(self, prompt: int, output: RequestOutput) -> None:
        """Adds what `output` has new to the usage."""
        if not self.prompt_only:
            for choice in output.outputs:
                self._generated += len(choice.token_ids)
        self._cached[prompt] = output.num_cached_tokens or 0

    def usage(self) -> Usage:
        given = sum(map(len, self.prompts))
        return Usage(given, self._generated, given + self._generated, PromptTokensDetails(sum(self._cached)))

    @abstractmethod
    def event(self, prompt: int, output: RequestOutput) -> bytes:
        """Server-sent events of what `output` has new; may be empty."""

    @abstractmethod
    def last_event(self) -> bytes:
        """What follows when every choice has finished; may be empty."""

    @abstractmethod
    def result(self, outputs: list[RequestOutput]) -> bytes:
        """The JSON body, from the complete output of each prompt."""


def _request_id(request: GenerationRequest) -> str:
    given = request.request_id
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise InvalidRequest(
            f"request_id is {given[:100]!r}: it must have 1 to 128 letters, digits and . _ : -", "request_id"
        )
    return given or uuid.uuid4().hex


def _stream_options(request: GenerationRequest) -> StreamOptions:
    if request.stream_options is None:
        return StreamOptions()
    if not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", "stream_options")
    options = parse(StreamOptions, request.stream_options, "stream_options.")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest(
            "stream_options.continuous_usage_stats needs include_usage to be true",
            "stream_options.continuous_usage_stats",
        )
    return options


def _check_prompt_logprobs(request: GenerationRequest, params: SamplingParams, prompts: list[list[int]]) -> None:
    """Every choice lists those of its prompt; an echoed prompt has them by `logprobs`, and may be streamed."""
    if params.prompt_logprobs is None:
        return
    name = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest(f"{name} cannot be streamed: leave out stream", name)
    count = sum(map(len, prompts)) * params.n * (params.prompt_logprobs + 1)
    if count > MAX_LISTED:
        raise InvalidRequest(
            f"{name} asks for {count} log-probabilities of prompt tokens, more than {MAX_LISTED}: ask for fewer, with "
            "fewer choices or for less text at once",
            name,
        )


async def respond(request: Request, prepare: Callable[[Context, bytes], Job]) -> Response:
    """Answers a request whose body `prepare` (thread-safe, no IO) makes a Job of.

    Whatever is wrong with the request shows before the first output, hence as an HTTP error.
    """
    context = context_of(request)
    body = await read_body(request, context.settings.max_body_bytes)

    async def begin() -> Response:
        job = await offload(lambda data: prepare(context, data), body)
        try:
            if job.stream:
                events = _events(job, run(context, job))
                return EventStream(await anext(events), events, context.running)
            return Response(await _result(job, await _collect(context, job)), media_type="application/json")
        except InvalidRequest as error:
            raise rename(error, job.renamed) from None

    return await while_connected(request.receive, begin(), context.running)


Outputs = AsyncGenerator[tuple[int, RequestOutput]]


async def _collect(context: Context, job: Job) -> list[RequestOutput]:
    async with aclosing(run(context, job)) as outputs:
        found = {prompt: output async for prompt, output in outputs}
    return [found[prompt] for prompt in range(len(job.prompts))]


async def _result(job: Job, outputs: list[RequestOutput]) -> bytes:
    """The body; log-probabilities, of which there may be a million, are put into words in a thread."""
    if job.params.logprobs is None and job.params.prompt_logprobs is None:
        return job.result(outputs)
    return await asyncio.to_thread(job.result, outputs)


async def _events(job: Job, outputs: Outputs) -> AsyncGenerator[bytes]:
    """Events of `outputs`. An error before the first event is raised, later it becomes the last one."""
    begun = False
    async with aclosing(outputs):
        try:
            async for prompt, output in outputs:
                if event := job.event(prompt, output):
                    begun = True
                    yield event
            if event := job.last_event():
                yield event
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, OctavoError):
                logger.exception("stream %s failed", job.id)
            yield error_event(error)


async def run(context: Context, job: Job) -> Outputs:
    """(prompt, output) as they come, of all prompts side by side; leaving it ends them all."""
    streams = [_observed(context, job, i) for i in range(len(job.prompts))]
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()

    async def drain(index: int) -> None:
        end: Exception | None = None
        try:
            async with aclosing(streams[index]) as stream:
                async for output in stream:
                    arrived.put_nowait((index, output))
        except Exception as error:
            end = error
        arrived.put_nowait((index, end))

    tasks = [asyncio.create_task(drain(i)) for i in range(len(streams))]
    unfinished = len(tasks)
    try:
        while unfinished:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _observed(context: Context, job: Job, prompt: int) -> AsyncGenerator[RequestOutput]:
    """One prompt's outputs, counted in usage and metrics."""
    timer = context.metrics.timer()
    stream = context.backend.generate(
        {"prompt_token_ids": job.prompts[prompt], "cache_salt": job.cache_salt},
        job.params,
        f"{job.id}-{prompt}",
        stream=job.stream,
        shown=job.shown,
    )
    async with aclosing(stream):
        async for output in stream:
            if output.error is not None:
                raise GenerationFailed(f"generation failed: {output.error}")
            timer.observe(output)
            job.count(prompt, output)
            yield output
