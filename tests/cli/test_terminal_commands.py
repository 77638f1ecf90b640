"""`complete` over a scripted engine, and what starts one."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import signal
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from octavo.cli import complete, session
from octavo.cli.session import Answer, open_session
from octavo.config.args import EngineArgs
from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams
from octavo.core.request import FinishReason
from octavo.frontend import AsyncLLM, CompletionOutput, RequestOutput
from octavo.frontend.progress import loading_bars


class ScriptedLLM:
    """Answers "<prompt>" token by token; "hang" is interrupted after a token."""

    def __init__(self) -> None:
        self.params: SamplingParams | None = None
        self.closed = 0
        self.down = False

    def default_params(self, max_tokens: int | None = None, **given: Any) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, **given)

    async def generate(self, prompt: str, params: SamplingParams, request_id: str) -> AsyncGenerator[RequestOutput]:
        self.params = params
        try:
            for index, piece in enumerate(["<", prompt, ">"]):
                reason: FinishReason | None = "stop" if index == 2 else None
                output = CompletionOutput(0, piece, [index], None, None, reason, None)
                yield RequestOutput(request_id, prompt, [], [output], reason is not None, None, None, 0, None)
                if "hang" in prompt:
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def shutdown(self) -> None:
        self.down = True


@pytest.fixture
def llm() -> ScriptedLLM:
    return ScriptedLLM()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Answer(num_tokens=11, first=0.5, last=2.5), "11 tokens, the first after 0.50 s, then 5.0 tokens/s"),
        (Answer(), "no tokens"),
        (Answer(num_tokens=1, first=0.5, last=0.5), "1 tokens, the first after 0.50 s"),
    ],
)
def test_speed_is_tokens_after_the_first(answer: Answer, line: str) -> None:
    assert answer.speed == line


def flags(**given: Any) -> argparse.Namespace:
    blank = dict.fromkeys(("max_tokens", *session.SAMPLING, "prompt"))
    return argparse.Namespace(**blank | given)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, llm: ScriptedLLM) -> list[EngineArgs]:
    """Puts the scripted engine in place of a real one; the arguments that it was started with."""
    calls: list[EngineArgs] = []

    async def start(args: EngineArgs, **_: Any) -> ScriptedLLM:
        calls.append(args)
        return llm

    monkeypatch.setattr(AsyncLLM, "start", start)
    logger = logging.getLogger("octavo")
    monkeypatch.setattr(logger, "handlers", logger.handlers)
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "level", logger.level)
    return calls


def test_complete_streams_to_standard_output(
    started: list[EngineArgs], llm: ScriptedLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete.run(flags(prompt="x", model="m", max_tokens=5, temperature=0.0)) == 0
    assert capsys.readouterr().out == "<x>\n"
    assert started == [EngineArgs(model="m")]
    assert llm.params == SamplingParams(max_tokens=5, temperature=0.0)
    assert llm.down


def test_complete_reads_standard_input(
    started: list[EngineArgs], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert complete.run(flags()) == 0
    assert capsys.readouterr().out == "<from a pipe>\n"


def test_an_interrupted_completion_ends_with_130(started: list[EngineArgs], llm: ScriptedLLM) -> None:
    assert complete.run(flags(prompt="hang")) == 130
    assert llm.closed == 1
    assert llm.down


def test_bad_sampling_values_start_no_engine(started: list[EngineArgs]) -> None:
    with pytest.raises(InvalidRequest, match="top_p"), open_session(flags(top_p=2.0)):
        pass
    assert started == []


def test_a_dropped_flag_is_said_once(started: list[EngineArgs], capsys: pytest.CaptureFixture[str]) -> None:
    complete.run(flags(prompt="x", trust_remote_code=True, swap_space="4"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--trust-remote-code" in said
    assert "--swap-space" in said


def test_no_bars_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with loading_bars() as progress:
        progress("weights", 1, 2)
    assert capsys.readouterr().err == ""
