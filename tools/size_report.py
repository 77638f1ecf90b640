"""Lines per package, the longest files and functions; fails when one is over the limit.

    python tools/size_report.py [--top N]

Counts every line of the files that git would see (tracked or not yet added) under octavo, tests and tools.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE = 700
MAX_FUNCTION = 100


class Size(NamedTuple):
    lines: int
    name: str


def sources(root: Path) -> list[Path]:
    """The Python files of the project, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [path for path in map(Path, listing.splitlines()) if (root / path).is_file()]


def package(path: Path) -> str:
    """Where a file's lines are counted: octavo/cli/chat.py in octavo/cli, octavo/llm.py in octavo."""
    return "/".join(path.parts[:2] if len(path.parts) > 2 else path.parts[:1])


def functions(path: Path, text: str) -> Iterator[Size]:
    """Every function with its length, decorators and docstring included."""
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield Size((node.end_lineno or node.lineno) - first + 1, f"{path}:{first} {node.name}")


def report(root: Path, top: int) -> list[str]:
    """Prints the report; returns what is over a limit."""
    per_package: Counter[str] = Counter()
    files: list[Size] = []
    longest: list[Size] = []
    for path in sources(root):
        text = (root / path).read_text()
        files.append(Size(text.count("\n"), str(path)))
        per_package[package(path)] += files[-1].lines
        longest += functions(path, text)
    for name in ("octavo", "tests", "tools", "benchmarks"):
        total = sum(lines for key, lines in per_package.items() if key.split("/")[0] == name)
        print(f"{total:7,}  {name}")
        for key, lines in sorted(per_package.items()):
            if key.startswith(name + "/"):
                print(f"{lines:11,}  {key.removeprefix(name + '/')}")
    for title, sizes in (("longest files", files), ("longest functions", longest)):
        print(f"\n{title}")
        for lines, name in sorted(sizes, reverse=True)[:top]:
            print(f"{lines:7,}  {name}")
    return [f"{name} has {lines} lines, more than {MAX_FILE}" for lines, name in files if lines > MAX_FILE] + [
        f"{name} has {lines} lines, more than {MAX_FUNCTION}" for lines, name in longest if lines > MAX_FUNCTION
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Lines per package, longest files and functions.")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many of the longest to show (default: 5)")
    excesses = report(ROOT, parser.parse_args().top)
    for excess in excesses:
        print(excess, file=sys.stderr)
    return 1 if excesses else 0


if __name__ == "__main__":
    sys.exit(main())
