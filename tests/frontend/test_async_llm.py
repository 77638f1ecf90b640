from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from octavo.core.errors import ConfigError, EngineDead, InvalidRequest
from octavo.core.params import SamplingParams
from octavo.frontend import AsyncLLM, RequestOutput, async_llm, client
from tests.frontend.conftest import Start


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No socket file, directory or descriptor stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield
    assert os.listdir(tempfile.gettempdir()) == []
    os.rmdir(tempfile.gettempdir())


async def collect(llm: AsyncLLM, prompt: Any, request_id: str = "r", **params: Any) -> list[RequestOutput]:
    stream = params.pop("stream", True)
    if salt := params.pop("cache_salt", ""):
        prompt = {"prompt": prompt, "cache_salt": salt}
    generator = llm.generate(prompt, SamplingParams(**params), request_id, stream=stream)
    return [output async for output in generator]


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.text for output in outputs for o in output.outputs if o.index == index)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_streamed_and_whole_results_are_equal(fake: Start) -> None:
    async with fake() as llm:
        streamed = await collect(llm, "héllo ", max_tokens=21)
        (whole,) = await collect(llm, "héllo ", max_tokens=21, stream=False)
    assert text_of(streamed) == text_of([whole]) == "héllo héllo héllo "
    assert whole.outputs[0].finish_reason == "length"
    assert [output.finished for output in streamed] == [False] * (len(streamed) - 1) + [True]
    assert whole.metrics is not None
    assert whole.metrics.arrival_time <= whole.metrics.first_token_time <= whole.metrics.last_token_time


async def test_start_reports_progress_and_stats_arrive(fake: Start) -> None:
    seen: list[tuple[str, int, int]] = []
    async with fake(progress=lambda *step: seen.append(step)) as llm:
        assert seen == [("weights", 1, 2)]
        await collect(llm, "abc", max_tokens=5)
        assert llm.stats.generated_tokens == 5
        assert llm.facts.vocab_size == 257
        await llm.check_health()


async def test_many_concurrent_requests_each_get_their_own(fake: Start) -> None:
    async with fake() as llm:
        results = await asyncio.gather(
            *(collect(llm, f"<{i}>", str(i), max_tokens=20, n=1 + i % 2) for i in range(200))
        )
        for i, outputs in enumerate(results):
            for index in range(1 + i % 2):
                assert text_of(outputs, index) == (f"<{i}>" * 20)[:20]
        assert llm.stats.prefix_queries < 50, "requests of one turn travel together"
        assert not llm._by_name
        assert not llm._by_engine_id
        assert not llm._outputs.states


async def test_a_stop_string_across_deltas_ends_the_sequence_in_the_engine(fake: Start) -> None:
    async with fake() as llm:
        outputs = await collect(llm, "abcdefg", max_tokens=4000, stop="gab")
        assert text_of(outputs) == "abcdef"
        assert outputs[-1].outputs[0].stop_reason == "gab"
        await until(lambda: llm.stats.preemptions == 1 and llm.stats.running == 0)


async def test_hundreds_of_arrivals_and_departures_leave_nothing(fake: Start) -> None:
    rng = random.Random(0)

    async def visit(llm: AsyncLLM, name: str) -> None:
        text, length, seen = f"<{name}>", rng.randint(1, 40), ""
        leaves_after, aborts_after = rng.randint(1, 60), rng.randint(1, 120)
        params = SamplingParams(max_tokens=length)
        async with aclosing(llm.generate(text, params, name)) as outputs:
            async for output in outputs:
                seen += "".join(piece.text for piece in output.outputs)
                if len(seen) >= aborts_after:
                    await llm.abort(name)
                if len(seen) >= leaves_after:
                    break
            else:
                assert output.finished
                assert len(seen) == length or output.outputs[0].finish_reason == "abort"
        assert (text * 40).startswith(seen)

    async with fake() as llm:
        tasks = []
        for i in range(300):
            tasks.append(asyncio.create_task(visit(llm, str(i))))
            if i % 10 == 0:
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
        await until(lambda: llm.stats.running == 0)
        assert not llm._by_name
        assert not llm._by_engine_id
        assert not llm._outputs.states


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_a_generator_ends_the_request(fake: Start, how: str) -> None:
    async with fake() as llm:
        if how == "close":
            generator = llm.generate("abc", SamplingParams(max_tokens=4000), "r")
            await anext(generator)
            await generator.aclose()
        else:
            task = asyncio.create_task(collect(llm, "abc", cache_salt="hang", max_tokens=4000))
            await until(lambda: llm._outputs.states)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: llm.stats.preemptions == 1 and llm.stats.running == 0)
        assert not llm._outputs.states
        assert text_of(await collect(llm, "abc", max_tokens=3)) == "abc", "the name is free again"


async def test_abort_by_name_returns_what_there_is(fake: Start) -> None:
    async with fake() as llm:
        generator = llm.generate("abc", SamplingParams(max_tokens=4000), "r")
        await anext(generator)
        await llm.abort("r")
        await llm.abort("nobody")
        (last,) = [output async for output in generator]
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
        await until(lambda: llm.stats.running == 0)


@pytest.mark.parametrize("n", [1, 2])
async def test_abort_of_what_is_not_streamed_returns_what_there_is(fake: Start, n: int) -> None:
    async with fake() as llm:
        waiting = asyncio.create_task(collect(llm, "abc", max_tokens=4000, n=n, stream=False))
        await until(lambda: llm.stats.generated_tokens >= 9)
        await llm.abort("r")
        await llm.abort("r")
        (output,) = await waiting
        assert output.finished
        assert [piece.finish_reason for piece in output.outputs] == ["abort"] * n
        for index in range(n):
            assert ("abc" * 1400).startswith(text_of([output], index))
            assert len(text_of([output], index)) >= 9 // n
        await until(lambda: llm.stats.running == 0)


async def test_a_slow_consumer_holds_up_nobody_and_misses_nothing(fake: Start) -> None:
    async with fake() as llm:
        slow = llm.generate("abcd", SamplingParams(max_tokens=400), "slow")
        first = await anext(slow)
        assert text_of(await collect(llm, "xy", "fast", max_tokens=600)) == "xy" * 300
        rest = [output async for output in slow]
        assert len(rest) == 1, "what came meanwhile was merged"
        assert text_of([first, *rest]) == "abcd" * 100


async def test_a_name_in_use_and_bad_requests_are_refused(fake: Start) -> None:
    async with fake() as llm:
        generator = llm.generate("abc", SamplingParams(max_tokens=4000), "r")
        await anext(generator)
        with pytest.raises(InvalidRequest, match="'r' is in use"):
            await collect(llm, "abc")
        with pytest.raises(InvalidRequest, match="empty"):
            await collect(llm, "", "other")
        with pytest.raises(InvalidRequest, match="tokens"):
            await collect(llm, "a" * 5000, "long")
        await generator.aclose()
        assert not llm._by_name


async def test_long_text_is_tokenized_beside_the_loop(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "INLINE_CHARS", 2)
    async with fake() as llm:
        assert text_of(await collect(llm, {"prompt": "abc"}, max_tokens=3)) == "abc"
        gate = threading.Event()
        process = llm.inputs.process
        monkeypatch.setattr(llm.inputs, "process", lambda *a, **k: gate.wait(5) and process(*a, **k))
        aborted = asyncio.create_task(collect(llm, "abc", "gone", max_tokens=3))
        await until(lambda: "gone" in llm._by_name)
        await llm.abort("gone")
        gate.set()
        (output,) = await aborted
        assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
        assert llm.stats.prefix_queries == 1, "it never reached the engine"


async def test_bad_words_are_tokenized_beside_the_loop(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[bool] = []
    async with fake() as llm:
        process = llm.inputs.process

        def watched(*args: Any, **options: Any) -> Any:
            beside.append(threading.current_thread() is not threading.main_thread())
            return process(*args, **options)

        monkeypatch.setattr(llm.inputs, "process", watched)
        await collect(llm, "abc", max_tokens=3, bad_words=["x"])
        await collect(llm, "abc", max_tokens=3)
    assert beside == [True, False]


async def test_reset_prefix_cache_answers(fake: Start) -> None:
    async with fake() as llm:
        assert await llm.reset_prefix_cache() is True
        generator = llm.generate("abc", SamplingParams(max_tokens=4000), "r")
        await anext(generator)
        assert await llm.reset_prefix_cache() is False
        await generator.aclose()


@pytest.mark.parametrize(("salt", "reason"), [("die", "exit code 7"), ("died", "out of memory in step 3")])
async def test_a_dead_engine_fails_everyone_with_its_reason(fake: Start, salt: str, reason: str) -> None:
    async with fake() as llm:
        others = [asyncio.create_task(collect(llm, "abc", str(i), cache_salt="hang")) for i in range(3)]
        await until(lambda: len(llm._outputs.states) == 3)
        began = time.monotonic()
        with pytest.raises(EngineDead, match=reason):
            await collect(llm, "abc", cache_salt=salt)
        for other in others:
            with pytest.raises(EngineDead, match=reason):
                await other
        assert time.monotonic() - began < 1
        assert reason in str(await llm.death())
        with pytest.raises(EngineDead, match=reason):
            await llm.check_health()
        with pytest.raises(EngineDead, match=reason):
            await collect(llm, "abc", "late")
        with pytest.raises(EngineDead, match=reason):
            await llm.reset_prefix_cache()


async def test_a_killed_engine_is_named(fake: Start) -> None:
    async with fake() as llm:
        waiting = asyncio.create_task(collect(llm, "abc", cache_salt="hang"))
        resetting = asyncio.create_task(llm.reset_prefix_cache())
        await until(lambda: llm._outputs.states)
        os.kill(llm._client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await waiting
        await asyncio.gather(resetting, return_exceptions=True)


@pytest.mark.parametrize(
    ("mode", "error", "words"), [("config", ConfigError, "need 3 have 2"), ("crash", EngineDead, "exit code 9")]
)
async def test_an_engine_that_cannot_start(fake: Start, mode: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        async with fake(mode):
            pass


async def test_errors_before_and_beside_the_engine_end_it(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ConfigError("no such model")

    for step in ("open_tokenizer", "resolve_config"):
        monkeypatch.setattr(async_llm, step, refuse)
        with pytest.raises(ConfigError, match="no such model"):
            async with fake():
                pass


async def test_shutdown_ends_waiting_requests_and_a_stubborn_engine(
    fake: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_SECONDS", 0.2)
    async with fake("stubborn") as llm:
        pid = llm._client.pid
        waiting = asyncio.create_task(collect(llm, "abc", cache_salt="hang"))
        await until(lambda: llm._outputs.states)
        await llm.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await waiting
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_polite_engine_leaves_at_once(fake: Start) -> None:
    async with fake() as llm:
        began = time.monotonic()
        await llm.shutdown()
        assert time.monotonic() - began < 2
