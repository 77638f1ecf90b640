"""`octavo complete`: streams one continuation to standard output, and how fast it was to standard error."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.session import open_session
from octavo.core.errors import ConfigError


def run(namespace: argparse.Namespace) -> int:
    prompt = namespace.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("there is nothing to continue: give --prompt, or the text on standard input")
        prompt = sys.stdin.read()
    with open_session(namespace) as session:
        answer = session.ask(prompt, _show)
    print()
    if sys.stderr.isatty():
        print(answer.speed, file=sys.stderr)
    return 130 if answer.finish_reason == "abort" else 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
