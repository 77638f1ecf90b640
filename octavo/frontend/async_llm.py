"""AsyncLLM: many requests at once against an engine process, each an asynchronous generator of results.

The way of a request:

    generate ── InputProcessor ── client.add ─────────────> engine process
       ^                                                        │ Outputs (one message a step)
       └── state.take() <── event ── OutputProcessor <── reader task
                                          └── client.finish (stop strings)

One reader task serves all requests and never waits for a consumer: what a consumer has not taken yet gathers in its
request's state. Leaving a generator early, however it happens, ends the request in the engine. When the engine dies,
every generator raises EngineDead with the reason. Owns the requests in flight and the engine process; not HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import msgspec

from octavo.config import EngineArgs
from octavo.config.engine import EngineConfig
from octavo.core.errors import ConfigError, EngineDead, InvalidRequest
from octavo.core.facts import ModelFacts
from octavo.core.params import SamplingParams
from octavo.core.request import Died, FromEngine, Outputs, Progress, Ready, Reply, Request, ResetPrefixCache, Stats
from octavo.frontend.client import EngineClient
from octavo.frontend.inputs import InputProcessor, Prompt
from octavo.frontend.launch import EngineProcess
from octavo.frontend.outputs import RequestOutput
from octavo.frontend.process import OutputProcessor, RequestState
from octavo.frontend.startup import logger, open_tokenizer, resolve_config
from octavo.structured import Vocabulary
from octavo.text import ChatTemplate, Tokenizer, model_template

INLINE_CHARS = 4096
"""Longer prompts are tokenized in a thread, so that they do not hold up the others' streams; bad words and grammars
always are."""


class _Ticket:
    """A request between its generator and the reader task."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.state: RequestState | None = None
        self.aborted = False


class AsyncLLM:
    """An engine process and the requests in flight. Made by `start`; every method belongs to one event loop."""

    config: EngineConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    inputs: InputProcessor
    stats: Stats

    def __init__(self, client: EngineClient, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        """Serves with an engine that is ready already; `start` is the usual way."""
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = model_template(tokenizer)
        self.inputs = InputProcessor(config, tokenizer)
        self.stats = Stats()
        self._client = client
        self._outputs = OutputProcessor(tokenizer)
        self._by_name: dict[str, _Ticket] = {}
        self._by_engine_id: dict[str, _Ticket] = {}
        self._engine_ids = map(str, itertools.count())
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._call_numbers = itertools.count()
        self._death: EngineDead | None = None
        self._reader = asyncio.create_task(self._read(), name="octavo-reader")

    @classmethod
    async def start(
        cls,
        args: EngineArgs,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        process: EngineProcess | None = None,
    ) -> AsyncLLM:
        """Starts the engine process and returns when it accepts requests.

        `progress` is called with (what, done, total) while it loads. `process` is one that runs already and may have
        been configured, with what follows from `args`; it ends with the AsyncLLM. Raises ConfigError for settings that
        cannot work, EngineDead when the process fails otherwise.
        """
        process = process or EngineProcess()
        client = EngineClient(process)
        tasks: list[asyncio.Task[Any]] = []
        try:
            config = process.config
            if config is None:
                config = await asyncio.to_thread(resolve_config, args)
                await asyncio.to_thread(process.configure, config)
            loading = asyncio.create_task(asyncio.to_thread(_open_vocabulary, args, config))
            starting = asyncio.create_task(_until_ready(client, progress))
            tasks = [loading, starting]
            (tokenizer, vocabulary), ready = await asyncio.gather(loading, starting)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close(grace=0)
            raise
        if ready.config:
            config = msgspec.msgpack.decode(ready.config, type=EngineConfig)
        llm = cls(client, config, tokenizer)
        llm.inputs.vocabulary = vocabulary
        return llm

    @property
    def facts(self) -> ModelFacts:
        return self.config.model

    @property
    def engine_pid(self) -> int:
        """Process id of the engine."""
        return self._client.pid

    def default_params(self, max_tokens: int | None = None, **given: Any) -> SamplingParams:
        """`given` values, where not None, over generation_config's defaults over SamplingParams' own."""
        return self.inputs.default_params(max_tokens, **given)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        stream: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> AsyncGenerator[RequestOutput]:
        """Results of one request. With `stream` each holds only what is new, else there is one, complete.

        `shown` are ids of special tokens that stay in the text whatever `skip_special_tokens` says.
        Raises InvalidRequest before anything is sent, EngineDead when the engine ends. Closing the generator aborts.
        """
        await self.check_health()
        if request_id in self._by_name:
            raise InvalidRequest(f"request id {request_id!r} is in use by a running request", "request_id")
        ticket = self._by_name[request_id] = _Ticket()
        engine_id = next(self._engine_ids)
        try:
            request, text = await self._prepare(prompt, params, engine_id)
            await self.check_health()
            request = msgspec.structs.replace(request, whole=not stream and not params.stops)
            state = self._outputs.add(request, text, request_id=request_id, stream=stream, shown=shown)
            ticket.state = state
            self._by_engine_id[engine_id] = ticket
            if ticket.aborted:
                self._outputs.abort(engine_id, time.time())
            else:
                self._client.add(request)
            while True:
                output = await self._next(ticket, state)
                yield output
                if output.finished:
                    return
        finally:
            del self._by_name[request_id]
            self._by_engine_id.pop(engine_id, None)
            self._abandon(engine_id)

    async def _next(self, ticket: _Ticket, state: RequestState) -> RequestOutput:
        if not state.finished:
            await ticket.event.wait()
            ticket.event.clear()
            if not state.finished:
                await self.check_health()
        return state.take()

    async def _prepare(self, prompt: Prompt, params: SamplingParams, engine_id: str) -> tuple[Request, str | None]:
        work = partial(self.inputs.process, prompt, params, engine_id, arrival=time.time())
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        is_long = isinstance(text, str) and len(text) > INLINE_CHARS
        if is_long or params.bad_words or params.structured_outputs is not None:
            return await asyncio.to_thread(work)
        return work()

    def _abandon(self, engine_id: str) -> None:
        """Ends a request that nobody waits for any more, here and in the engine."""
        if self._outputs.abort(engine_id, time.time()) is not None:
            self._client.finish([(engine_id, -1)])

    async def abort(self, request_id: str) -> None:
        """Ends a request: its generator returns what has come, with finish_reason "abort". Unknown ids are ignored."""
        ticket = self._by_name.get(request_id)
        if ticket is None:
            return
        ticket.aborted = True
        if ticket.state is not None:
            request = ticket.state.request
            if request.whole:  # the engine has what has come
                self._client.finish([(request.id, -1)])
            else:
                self._abandon(request.id)
                ticket.event.set()

    async def reset_prefix_cache(self) -> bool:
        """Forgets the prefix cache. False when running requests hold blocks of it."""
        await self.check_health()
        number = next(self._call_numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._client.send(ResetPrefixCache(number))
            return await self._calls[number]
        finally:
            del self._calls[number]

    async def check_health(self) -> None:
        """Raises EngineDead, with the reason, when the engine has ended."""
        if self._death is not None:
            raise EngineDead(str(self._death))

    async def death(self) -> EngineDead:
        """Waits for the engine's end, which every generator is told of, and says how it ended."""
        await asyncio.wait([self._reader])
        assert self._death is not None
        return self._death

    async def shutdown(self) -> None:
        """Ends the engine process and what still waits for it. Safe to call twice."""
        self._fail(EngineDead("the engine was shut down"))
        self._reader.cancel()
        await asyncio.wait([self._reader])
        await self._client.close()

    async def _read(self) -> None:
        """The reader task: whatever ends it, nobody is left waiting."""
        try:
            while True:
                self._dispatch(await self._client.receive())
                await asyncio.sleep(0)  # receive() does not yield while messages are there
        except EngineDead as death:
            self._fail(death)
        except Exception as error:
            logger.exception("reading the engine's output failed")
            self._fail(EngineDead(f"reading the engine's output failed: {error!r}"))

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Outputs(deltas, stats):
                self.stats = stats
                ready, ended = self._outputs.process(deltas, time.time())
                for state in ready:
                    self._by_engine_id[state.request.id].event.set()
                if ended:
                    self._client.finish(ended)
            case Reply(call, ok):
                if call in self._calls and not self._calls[call].done():
                    self._calls[call].set_result(ok)
            case Died(error):
                raise EngineDead(error)

    def _fail(self, death: EngineDead) -> None:
        self._death = self._death or death
        for ticket in self._by_engine_id.values():
            ticket.event.set()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead(str(self._death)))


def _open_vocabulary(args: EngineArgs, config: EngineConfig) -> tuple[Tokenizer | None, Vocabulary | None]:
    """The tokenizer, also prepared for grammars from now on, while the engine still loads; its template as well."""
    tokenizer = open_tokenizer(args, config.model)
    model_template(tokenizer)  # compiled once a process
    vocabulary = InputProcessor(config, tokenizer).vocabulary
    if vocabulary is not None:
        vocabulary.prepare_soon()
    return tokenizer, vocabulary


async def _until_ready(client: EngineClient, progress: Callable[[str, int, int], None] | None) -> Ready:
    while True:
        match await client.receive():
            case Ready() as ready:
                return ready
            case Progress(what, done, total) if progress is not None:
                progress(what, done, total)
            case Died(error, is_config):
                raise ConfigError(error) if is_config else EngineDead(error)
