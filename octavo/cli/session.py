"""An engine for one person at a terminal: started with progress bars, asked one thing at a time.

`complete` runs on it, `chat` starts its engine and measures its answers as it does. The event loop turns only while
an answer is awaited. Ctrl-C during an answer ends that answer. Owns the engine process; not what is asked.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import msgspec

from octavo.cli.terminal import log_to_stderr
from octavo.config.args import EngineArgs
from octavo.config.flags import parse_given
from octavo.core.params import SamplingParams

if TYPE_CHECKING:
    from octavo.frontend import AsyncLLM

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Answer(msgspec.Struct):
    """What came back, and how fast. Times in seconds since the question."""

    text: str = ""
    reasoning: str = ""
    num_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    finish_reason: str | None = None

    @property
    def speed(self) -> str:
        """Tokens per second after the first one, and the wait for that one, in words."""
        if not self.num_tokens:
            return "no tokens"
        line = f"{self.num_tokens} tokens, the first after {self.first:.2f} s"
        if self.num_tokens > 1 and self.last > self.first:
            line += f", then {(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return line


class Session:
    """A running engine and the sampling parameters of the command line. Made by `open_session`."""

    def __init__(self, runner: asyncio.Runner, llm: AsyncLLM, params: SamplingParams) -> None:
        self.llm = llm
        self._params = params
        self._runner = runner
        self._count = 0

    def ask(self, prompt: str, show: Callable[[str], None]) -> Answer:
        """The continuation of `prompt`; its text goes to `show` piece by piece.

        Ctrl-C ends the answer, whose finish_reason is then "abort". Raises InvalidRequest, EngineDead.
        """
        answer = Answer()
        try:
            self._runner.run(self._ask(prompt, show, answer))
        except KeyboardInterrupt:
            answer.finish_reason = "abort"
        return answer

    async def _ask(self, prompt: str, show: Callable[[str], None], answer: Answer) -> None:
        self._count += 1
        begin = time.monotonic()
        outputs = self.llm.generate(prompt, self._params, str(self._count))
        async with aclosing(outputs):
            async for output in outputs:
                (piece,) = output.outputs
                answer.last = time.monotonic() - begin
                answer.first = answer.first or answer.last
                answer.num_tokens += len(piece.token_ids)
                answer.text += piece.text
                answer.finish_reason = piece.finish_reason
                show(piece.text)


@contextmanager
def open_session(namespace: argparse.Namespace) -> Iterator[Session]:
    """Starts the engine that the flags in `namespace` describe, and ends it."""
    args, _, dropped = parse_given(namespace)
    given = {name: value for name in SAMPLING if (value := getattr(namespace, name)) is not None}
    SamplingParams(max_tokens=namespace.max_tokens, **given)  # refuses bad values before an engine is started
    log_to_stderr(logging.WARNING, dropped)
    with asyncio.Runner() as runner:
        llm = runner.run(start_engine(args))
        try:
            yield Session(runner, llm, llm.default_params(namespace.max_tokens, **given))
        finally:
            runner.run(llm.shutdown())


async def start_engine(args: EngineArgs) -> AsyncLLM:
    """An engine process that is ready, with progress bars meanwhile. Raises ConfigError, EngineDead."""
    from octavo.frontend import AsyncLLM
    from octavo.frontend.progress import loading_bars

    with loading_bars() as progress:
        return await AsyncLLM.start(args, progress=progress)
