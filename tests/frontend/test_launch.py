"""The engine's process by itself: nothing stays of it, whoever leaves first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.config import EngineArgs
from octavo.frontend import AsyncLLM, async_llm
from octavo.frontend.launch import EngineProcess
from tests.frontend import fake_engine
from tests.frontend.tiny import byte_tokenizer, tiny_config

WAITS = (sys.executable, "-c", "import sys; sys.stdin.buffer.read()")


def folder_of(process: EngineProcess) -> Path:
    return Path(process.inbox.removeprefix("ipc://")).parent


def test_closing_leaves_neither_the_process_nor_its_sockets_folder() -> None:
    process = EngineProcess(WAITS)
    assert folder_of(process).is_dir()
    for _ in range(2):
        process.close()
    assert not folder_of(process).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    assert process.describe_end().startswith("was killed by SIGKILL")


def test_a_command_that_does_not_exist_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        EngineProcess((str(tmp_path / "none"),))
    assert list(tmp_path.iterdir()) == []


def test_configuring_a_process_that_has_ended_is_no_error() -> None:
    process = EngineProcess((sys.executable, "-c", "raise SystemExit(7)"))
    process.wait()
    process.configure(tiny_config())
    assert process.describe_end() == "ended with exit code 7"
    process.close()


async def test_a_configured_process_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "open_tokenizer", lambda args, facts: byte_tokenizer())
    monkeypatch.setattr(async_llm, "resolve_config", lambda args: pytest.fail("the configuration is there"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    process, config = EngineProcess((sys.executable, fake_engine.__file__, "ok")), tiny_config(max_model_len=77)
    process.configure(config)
    llm = await AsyncLLM.start(EngineArgs(), process=process)
    try:
        assert llm.engine_pid == process.pid
        assert llm.config.scheduler.max_model_len == 77
    finally:
        await llm.shutdown()
    assert not folder_of(process).exists()


def test_it_is_imported_before_anything_large() -> None:
    code = (
        "import sys, octavo.cli.serve, octavo.frontend.launch\n"
        "assert not {'asyncio', 'numpy', 'starlette', 'tokenizers', 'zmq'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
