"""A scripted backend: it answers with the prompt, through the frontend's own validation and presentation.

Token i is byte i. Choice c of a request answers with the prompt's tokens rotated by c, then <eos>. Words in the prompt
change the script: HANG never ends after the echo, FAIL ends with an error of the engine, DIE kills the engine, BUG
raises what nobody expects; each after three tokens where not said otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from octavo.core.errors import EngineDead
from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request, Stats, TokenLogprobs
from octavo.frontend.inputs import InputProcessor, Prompt
from octavo.frontend.outputs import RequestOutput
from octavo.frontend.process import OutputProcessor
from octavo.text import ChatTemplate, Tokenizer
from tests.frontend.tiny import EOS, byte_tokenizer, tiny_config

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}{% if m.name %}:{{ m.name }}{% endif %}>{{ m.content }}{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class EchoBackend:
    """See the module. `live` are the requests being generated; `idle` is set while there are none."""

    def __init__(self, *, tokenizer: bool = True, template: bool = True, max_model_len: int = 4096) -> None:
        self.config = tiny_config(max_model_len)
        self.facts = self.config.model
        self.tokenizer: Tokenizer | None = byte_tokenizer() if tokenizer else None
        self.chat_template = ChatTemplate(TEMPLATE, byte_tokenizer()) if template else None
        self.stats = Stats(running=2, waiting=1, kv_blocks_used=25, kv_blocks_total=100, prompt_tokens=7)
        self.inputs = InputProcessor(self.config, self.tokenizer)
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.idle = threading.Event()
        self.hanging = threading.Event()
        self.dead = False
        self.died = asyncio.Event()
        self.closed = False

    def script(self, request: Request) -> Iterator[list[Delta]]:
        return script(request)

    def default_params(self, max_tokens: int | None = None, **given: Any) -> SamplingParams:
        return self.inputs.default_params(max_tokens, **given)

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDead("it was told to")

    async def death(self) -> EngineDead:
        await self.died.wait()
        return EngineDead("out of luck")

    async def shutdown(self) -> None:
        self.closed = True

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, stream: bool, shown: frozenset[int]
    ) -> AsyncGenerator[RequestOutput]:
        await self.check_health()
        request, text = self.inputs.process(prompt, params, request_id, arrival=time.time())
        self.requests.append(request)
        outputs = OutputProcessor(self.tokenizer)
        state = outputs.add(request, text, stream=stream, shown=shown)
        self.live.add(request_id)
        self.idle.clear()
        try:
            for deltas in self.script(request):
                if not deltas:
                    self.hanging.set()
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                touched, _ = outputs.process(deltas, time.time())
                if touched:
                    output = state.take()
                    yield output
                    if output.finished:
                        return
        except EngineDead:
            self.died.set()
            raise
        finally:
            self.live.discard(request_id)
            if not self.live:
                self.idle.set()


def script(request: Request) -> Iterator[list[Delta]]:
    """Per step the deltas of all sequences; an empty list stands for waiting forever."""
    words = bytes(t for t in request.prompt_token_ids if t < 256)
    replies = [_reply(request, index) for index in range(request.params.n)]
    for step in range(max(map(len, replies))):
        if step == 3 and b"DIE" in words:
            raise EngineDead("out of luck")
        if step == 3 and b"BUG" in words:
            raise ZeroDivisionError("a bug")
        if step == 3 and b"FAIL" in words:
            yield [Delta(request.id, index, [], "error", error="kernel panic") for index in range(len(replies))]
        if b"HANG" in words and step == len(replies[0]) - 1:
            yield []
        yield [_delta(request, index, step, reply) for index, reply in enumerate(replies) if step < len(reply)]


def _reply(request: Request, index: int) -> list[int]:
    prompt, params = request.prompt_token_ids, request.params
    assert params.max_tokens is not None
    turn = index % len(prompt)
    reply = [*prompt[turn:], *prompt[:turn]]
    reply = reply * (params.max_tokens // len(reply) + 1) if params.ignore_eos else [*reply, EOS]
    return reply[: params.max_tokens]


def _delta(request: Request, index: int, step: int, reply: list[int]) -> Delta:
    params, token = request.params, reply[step]
    delta = Delta(request.id, index, [token], cached_tokens=2, scheduled_at=time.time())
    if step == len(reply) - 1:
        delta.finish_reason = "stop" if token == EOS and not params.ignore_eos else "length"
    if params.logprobs is not None:
        delta.logprobs = [candidates(token, params.logprobs)]
    if params.prompt_logprobs is not None and step == 0:
        told = [candidates(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:]]
        delta.prompt_logprobs = [None, *told]
    return delta


def candidates(token: int, count: int) -> TokenLogprobs:
    """The chosen token is the second best: probability 1/4 after 1/2 for the next token id."""
    best = [(token + 1) % 256, token, *((token + i) % 256 for i in range(2, 40))][:count]
    values = [-0.5, -1.0, *(-2.0 - i for i in range(38))][:count]
    return TokenLogprobs([token, *best], [-1.0, *values], 2)
