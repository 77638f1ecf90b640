"""How benchmarks report: a table for people, JSON lines for programs, percentiles, and what machine it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import octavo
from octavo.core.errors import ConfigError

Result = dict[str, Any]


def machine() -> Result:
    """Machine and versions, part of every JSON line."""
    versions = {"octavo": octavo.__version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"machine": platform.machine(), "cores": os.cpu_count(), "versions": versions}


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Mean and the 50th, 90th and 99th percentile of `values` times `scale`; empty without values."""
    if not values:
        return {}
    array = np.asarray(values) * scale
    found = [array.mean(), *np.percentile(array, [50, 90, 99])]
    return {name: round(float(value), 3) for name, value in zip(("mean", "p50", "p90", "p99"), found, strict=True)}


def table(columns: Mapping[str, str], results: Sequence[Result]) -> str:
    """Rows of `results`; `columns` maps keys to headings. Numbers stand on the right, with separators."""
    rows = [list(columns.values()), *([_show(result.get(key)) for key in columns] for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def emit(result: Result, path: str | None, *, more: bool = False) -> None:
    """Prints a result as a JSON line, and writes it to `path`, with `more` behind those that it has.

    Raises ConfigError when it cannot be written.
    """
    line = json.dumps(result)
    print(line, flush=True)
    if path is not None:
        try:
            with Path(path).open("a" if more else "w") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise ConfigError(f"--output-json {path} cannot be written: {error.strerror}") from None
