"""The command line from outside: help, refusals, exit codes, and what stays unimported."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from octavo.cli.entry import BENCHES, COMMANDS, build_parser, main
from tests.cli.program import octavo, python

TORCH_FREE = """
import sys
{code}
assert "torch" not in sys.modules and "triton" not in sys.modules, "torch was imported"
assert {web} or "starlette" not in sys.modules, "the web stack was imported"
"""


@pytest.mark.parametrize(
    ("code", "web"),
    [
        ("import octavo.cli", False),
        ("import octavo.config", False),
        ("import octavo.server", True),
        ("import octavo.cli.serve, octavo.cli.chat, octavo.cli.complete, octavo.cli.doctor", True),
        ("import octavo.server.run, octavo.frontend", True),
    ],
)
def test_importing_leaves_torch_alone(code: str, web: bool) -> None:
    done = python(TORCH_FREE.format(code=code, web=web))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["serve", "--dtype", "int3"], ["nonsense"]])
def test_help_and_refusals_leave_torch_alone(words: list[str]) -> None:
    code = f"from octavo.cli import main\ntry: main({words!r})\nexcept SystemExit: pass"
    done = python(TORCH_FREE.format(code=code, web=False))
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command() -> None:
    done = octavo("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"bench {kind}" for kind in BENCHES)])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: octavo {command}" in capsys.readouterr().out


def test_help_of_serve_shows_own_flags_and_hides_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--max-model-len", "--no-enable-prefix-caching", "--served-model-name", "--api-key", "--port"):
        assert flag in shown
    for flag in ("--enable-lora", "--swap-space", "--kv-cache-dtype"):
        assert flag not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve --max-modl-len 5", "unknown argument --max-modl-len: did you mean --max-model-len?"),
        ("serve --prot=1", "unknown argument --prot: did you mean --port?"),
        ("serve --max-model 5", "unknown argument --max-model"),
        ("serve --max-model-len abc", "argument --max-model-len: invalid integer value: 'abc'"),
        ("serve one two", "unknown argument two"),
        ("chat --port 1", "unknown argument --port"),
        ("srve", "invalid choice: 'srve'"),
        ("", "required: COMMAND"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_and_exit_code_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve --dtype int3", "--dtype is 'int3'"),
        ("serve --enable-lora", "--enable-lora is not built yet"),
        ("serve --no-enable-chunked-prefill", "--no-enable-chunked-prefill is not built yet"),
        ("serve -tp 2", "--tensor-parallel-size is 2"),
        ("serve m --model n", "MODEL is given twice"),
        ("serve --chat-template /no/such/file", "--chat-template is '/no/such/file'"),
        ("complete --prompt x --temperature -1", "temperature is -1.0"),
        ("chat --device tpu", "--device is 'tpu'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("octavo: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_busy_port_is_refused_before_an_engine_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert str(port) in said
    assert "--port" in said
    assert "no-such-model" not in said


def test_a_model_that_is_not_there_is_refused_without_a_traceback(tmp_path: Path) -> None:
    done = octavo("serve", str(tmp_path / "nothing"), "--port", "0")
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_only_the_command_asked_for_gets_flags() -> None:
    _, commands = build_parser(["serve"])
    assert len(commands["serve"]._actions) > 30
    assert len(commands["chat"]._actions) == 1
