"""JSON files of a model directory, read with errors that name the file; token ids in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.core.errors import ConfigError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ConfigError naming the file otherwise."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, not a JSON object: download it again")
    return value


def token_ids(config: dict[str, Any], key: str, file: Path) -> tuple[int, ...]:
    """The ids under `key`: none, one or a list."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{file}: {key} is {value!r}, not a token id or a list of them: correct it")
    return tuple(ids)


def merge_ids(vocab_size: int, *sources: tuple[int, ...]) -> tuple[int, ...]:
    """The union in order of first mention; ids outside the vocabulary can never be sampled and are left out."""
    return tuple(dict.fromkeys(i for ids in sources for i in ids if 0 <= i < vocab_size))
