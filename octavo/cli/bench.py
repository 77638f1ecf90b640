"""`octavo bench`: hands over to octavo.bench."""

from __future__ import annotations

import argparse

from octavo.bench import run as run_bench


def run(namespace: argparse.Namespace) -> int:
    return run_bench(namespace.kind, namespace)
