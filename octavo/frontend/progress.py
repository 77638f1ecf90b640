"""Progress bars on standard error: loading, and offline generation. Nothing is drawn where it is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def _bar(*columns: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=4,
    )


@contextmanager
def loading_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what `load` calls with (what, done, total): one bar for each `what`."""
    with _bar("{task.percentage:>3.0f}%") as bar:
        tasks = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


@contextmanager
def generation_bar(total: int, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields what is called with (requests finished, tokens generated) as they come; both are added up."""
    if not enabled:
        yield lambda requests, tokens: None
        return
    with _bar("{task.completed}/{task.total}", "{task.fields[rate]}") as bar:
        task = bar.add_task("Generating", total=total, rate="")
        generated = 0

        def advance(requests: int, tokens: int) -> None:
            nonlocal generated
            generated += tokens
            elapsed = bar.tasks[0].elapsed
            rate = f"{generated / elapsed:,.0f} tok/s" if elapsed else ""
            bar.update(task, advance=requests, rate=rate)

        yield advance
