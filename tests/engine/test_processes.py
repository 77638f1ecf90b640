"""Ranks as processes: the same tokens, and an end that is quick, clear and complete, whichever of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.config import EngineArgs
from octavo.core.errors import ConfigError, EngineDead
from octavo.core.params import SamplingParams
from octavo.core.plan import Masks
from octavo.core.request import Request
from octavo.engine import Engine, InlineExecutor
from octavo.engine.executor import executor_for
from octavo.frontend import AsyncLLM
from tests.support.tiny import tiny_config, write_tiny

OPTIONS: dict[str, Any] = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4, "num_gpu_blocks_override": 100}
NUMBERS = itertools.count()
SECONDS = 2.0
"""From a rank's death to every client's error."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny("mixed", path)
    return path


def requests(max_tokens: int = 8) -> Iterator[Request]:
    shared = [7, 3, 9, 1, 4, 4, 8, 2, 6]
    for i, prompt in enumerate(([*shared, 5, 5], [5], shared[:8], [*shared, 10, 11])):
        params = SamplingParams(temperature=i % 2 * 0.8, seed=i, max_tokens=max_tokens + i, ignore_eos=True)
        yield Request(str(i), prompt, params, 0.0)


def generate(engine: Engine) -> dict[str, list[int]]:
    for request in requests():
        engine.add(request)
    got: dict[str, list[int]] = {}
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            got.setdefault(delta.request_id, []).extend(delta.token_ids)
    return got


def generate_after_a_mask(engine: Engine) -> list[int]:
    """The first token may only be 5; the others follow freely, so a rank that took another one would show."""
    engine.add(Request("masked", [3, 1, 2], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), 0.0))
    plan = engine.scheduler.schedule()
    assert plan is not None
    result = engine._executor.launch(plan)(Masks(np.array([0], np.int32), np.array([[1 << 5]], np.int32))).result()
    deltas = engine.scheduler.commit(result)
    while engine.has_work():
        deltas += engine.step()
    return [token for delta in deltas for token in delta.token_ids]


def step_on(engine: Engine) -> None:
    while True:
        engine.step()


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def ranks_of(pid: int) -> list[int]:
    return [p for p in descendants(pid) if b"octavo.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def open_files() -> Counter[str]:
    """Rings, doorbells and sockets of this process, by kind."""
    kinds: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kind = str(entry.readlink()).split(":")[0]
            if kind in ("/memfd", "socket", "anon_inode"):
                kinds[kind] += 1
    return kinds


async def gone(pids: list[int]) -> None:
    """Waits until none of the processes runs."""
    async with asyncio.timeout(10):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)


def test_tokens_equal_those_of_one_process(folder: Path) -> None:
    alone = tiny_config(folder, **OPTIONS)
    one = Engine(alone, executor=InlineExecutor(alone))
    one.load()
    wanted, masked = generate(one), generate_after_a_mask(one)
    assert masked[0] == 5
    config = tiny_config(folder, tensor_parallel_size=2, pipeline_parallel_size=2, **OPTIONS)
    before, shared = open_files(), set(os.listdir("/dev/shm"))
    engine = Engine(config)
    engine.load()
    ranks = ranks_of(os.getpid())
    assert len(ranks) == 3
    assert generate(engine) == wanted
    assert generate(engine) == wanted
    assert generate_after_a_mask(engine) == masked
    engine.close()
    engine.close()
    assert not ranks_of(os.getpid())
    assert set(os.listdir("/dev/shm")) == shared
    assert open_files() <= before, "a ring or a port is left"


def test_a_killed_rank_is_named(folder: Path) -> None:
    config = tiny_config(folder, tensor_parallel_size=2, **OPTIONS)
    before = open_files()
    engine = Engine(config)
    engine.load()
    for request in requests(40):
        engine.add(request)
    for _ in range(5):
        engine.step()
    (rank,) = ranks_of(os.getpid())
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineDead, match=rf"rank 1 \(process {rank}\) was killed by SIGKILL, exit code -9"):
        step_on(engine)
    assert time.monotonic() - began < SECONDS
    with pytest.raises(EngineDead, match="SIGKILL"):
        engine.step()
    engine.close()
    assert not ranks_of(os.getpid())
    assert open_files() <= before, "a ring or a port is left while somebody holds the engine"


def test_a_rank_that_cannot_load_is_heard(folder: Path) -> None:
    """Rank 1 finds no file where rank 0 found one."""
    config = tiny_config(folder, tensor_parallel_size=2, **OPTIONS)
    executor = executor_for(config)
    hidden = folder / "model.safetensors"
    moved = hidden.rename(folder / "hidden")
    try:
        with pytest.raises(ConfigError, match="safetensors"):
            executor.load()
    finally:
        moved.rename(hidden)
    assert not ranks_of(os.getpid())


async def start(folder: Path) -> tuple[AsyncLLM, list[int]]:
    """With the processes that it has started: other tests may keep servers of their own."""
    before = set(descendants(os.getpid()))
    args = EngineArgs(
        model=str(folder),
        dtype="float64",
        device="cpu",
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        **OPTIONS,
    )
    llm = await AsyncLLM.start(args)
    return llm, [pid for pid in descendants(os.getpid()) if pid not in before]


async def consume(llm: AsyncLLM, prompt: list[int], tokens: int = 50) -> list[int]:
    got: list[int] = []
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": prompt}, params, f"client {next(NUMBERS)}"):
        got += output.outputs[0].token_ids
    return got


async def test_clients_hear_of_a_killed_rank_and_ranks_leave_with_a_killed_engine(folder: Path) -> None:
    llm, pids = await start(folder)
    (rank,) = ranks_of(os.getpid())
    wanted = await consume(llm, [3, 4], 5)
    clients = [asyncio.create_task(consume(llm, [i, 5, 6])) for i in range(8)]
    while not llm.stats.running:
        await asyncio.sleep(0.01)
    os.kill(rank, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        for error in await asyncio.gather(*clients, return_exceptions=True):
            assert isinstance(error, EngineDead)
            assert f"rank 1 (process {rank}) was killed by SIGKILL, exit code -9" in str(error)
    await llm.shutdown()
    await gone(pids)
    again, pids = await start(folder)
    assert await consume(again, [3, 4], 5) == wanted
    (engine,) = [p for p in pids if b"octavo.engine" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(engine, signal.SIGKILL)
    await gone(pids)
    await again.shutdown()


async def test_an_idle_engine_hears_of_it_too(folder: Path) -> None:
    llm, pids = await start(folder)
    (rank,) = ranks_of(os.getpid())
    os.kill(rank, signal.SIGKILL)
    await gone(pids)
    with pytest.raises(EngineDead, match="rank 1"):
        await consume(llm, [1, 2])
    await llm.shutdown()
