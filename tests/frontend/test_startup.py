from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from octavo.config import EngineArgs
from octavo.frontend.progress import generation_bar, loading_bars
from octavo.frontend.startup import open_tokenizer, resolve_config


def test_the_embedded_model_is_resolved_and_each_decision_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")
    args = EngineArgs(max_model_len=512, device="cpu", num_gpu_blocks_override=100)
    config = resolve_config(args)
    assert (config.model.architecture, config.scheduler.max_model_len, config.cache.num_blocks) == ("llama", 512, 100)
    lines = [record.message for record in caplog.records]
    assert any(line.startswith("max_model_len = 512 (") for line in lines)
    tokenizer = open_tokenizer(args, config.model)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"
    assert open_tokenizer(EngineArgs(tokenizer=config.model.path), config.model) is not None
    assert open_tokenizer(EngineArgs(skip_tokenizer_init=True), config.model) is None


def test_bars_draw_on_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> str:
        with loading_bars() as progress:
            progress("weights", 1, 2)
            progress("weights", 2, 2)
        with generation_bar(3, True) as advance:
            advance(3, 300)
        with generation_bar(3, False) as advance:
            advance(3, 300)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert draw().strip() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    drawn = draw()
    assert "weights" in drawn
    assert drawn.count("Generating") >= 1


def test_the_frontend_leaves_torch_unimported() -> None:
    code = "import sys, octavo.frontend; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
