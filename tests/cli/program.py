"""Runs the command as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python `code`."""
    return _run([sys.executable, "-c", code])


def octavo(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `octavo WORDS...`."""
    return _run([sys.executable, "-m", "octavo.cli", *words])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
