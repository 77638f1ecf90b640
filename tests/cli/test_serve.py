"""What `octavo serve` prints, and its settings. The server itself is tests/server's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import cast

import pytest

from octavo.cli.serve import curl, read_template, ready_lines
from octavo.cli.terminal import seconds_since_start
from octavo.config.args import ServerArgs
from octavo.core.errors import ConfigError
from octavo.server.backend import Backend
from tests.server.echo import EchoBackend

URL = "http://127.0.0.1:9"


def command(tokenizer: bool = True, template: bool = True, server: ServerArgs | None = None) -> list[str]:
    backend = cast("Backend", EchoBackend(tokenizer=tokenizer, template=template))
    return shlex.split(curl(backend, URL, server or ServerArgs()))


@pytest.mark.parametrize(
    ("tokenizer", "template", "route", "field"),
    [
        (True, True, "chat/completions", "messages"),
        (True, False, "completions", "prompt"),
        (False, False, "completions", "prompt"),
    ],
)
def test_the_command_fits_what_the_model_can_do(tokenizer: bool, template: bool, route: str, field: str) -> None:
    words = command(tokenizer, template)
    assert words[:2] == ["curl", f"{URL}/v1/{route}"]
    body = json.loads(words[words.index("-d") + 1])
    assert field in body
    assert isinstance(body[field], str) == (tokenizer and not template)


def test_a_key_is_not_shown() -> None:
    words = command(server=ServerArgs(api_key=("secret",)))
    assert "Authorization: Bearer $OCTAVO_API_KEY" in words
    assert "secret" not in " ".join(words)


def test_the_ready_line_has_url_model_and_seconds() -> None:
    first, second = ready_lines(cast("Backend", EchoBackend()), URL, "name", ServerArgs()).split("\n")
    assert first.startswith(f"Octavo serves name at {URL} (ready ")
    assert float(first.split("(ready ")[1].split()[0]) >= 0
    assert second.startswith("curl ")


def test_a_template_is_a_file_or_itself(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert read_template(str(file)) == read_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match="neither a readable file"):
        read_template(str(tmp_path))


def test_seconds_since_start_are_counted_from_the_process(tmp_path: Path) -> None:
    assert seconds_since_start() > 0
    stat = tmp_path / "stat"
    stat.write_text("1 (odd ) name) S " + " ".join(["0"] * 18) + " 0 0 0\n")  # created as the machine booted
    assert seconds_since_start(stat) > seconds_since_start()
    assert seconds_since_start(tmp_path / "none") >= 0
