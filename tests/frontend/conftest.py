from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from octavo.config import EngineArgs
from octavo.frontend import AsyncLLM, async_llm
from octavo.frontend.launch import EngineProcess
from tests.frontend import fake_engine
from tests.frontend.tiny import byte_tokenizer, tiny_config

Progress = Callable[[str, int, int], None]
Start = Callable[..., AbstractAsyncContextManager[AsyncLLM]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts an AsyncLLM over the scripted engine process, in the mode that is given."""
    monkeypatch.setattr(async_llm, "resolve_config", lambda args: tiny_config(max_model_len=4096))
    monkeypatch.setattr(async_llm, "open_tokenizer", lambda args, facts: byte_tokenizer())
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    @asynccontextmanager
    async def start(
        mode: str = "ok", progress: Callable[[str, int, int], None] | None = None
    ) -> AsyncIterator[AsyncLLM]:
        process = EngineProcess((sys.executable, fake_engine.__file__, mode))
        llm = await AsyncLLM.start(EngineArgs(), progress=progress, process=process)
        try:
            yield llm
        finally:
            await llm.shutdown()

    return start
