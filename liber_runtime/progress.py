"""Progress of long steps on the terminal: a bar with rate and remaining time, a line where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of units done since the last call."""

console = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Progress and notes go to standard error, so that standard output holds results alone. Ids and paths from outside may
be in what is printed, so nothing of it is markup."""


_RATED_SECONDS = 300.0
"""Rate and remaining time are of the last so many seconds: a unit, as a whole training, may take a minute."""


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.0f}/s" if speed >= 1 else f"{60 * speed:,.1f}/min", style="cyan")


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Shows one step.

    Args:
        title: what is being done, e.g. ``append behaviors``.
        total: units to do; None if unknown.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}"),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=_RATED_SECONDS) as display:
        task = display.add_task(title, total=total)
        yield lambda done: display.advance(task, done)
        # A step may be done before its total, as training that stops early is.
        display.update(task, total=display.tasks[task].completed)


@contextmanager
def reading_progress(title: str, total: int | None, *, size: str = "") -> Iterator[Callable[[int, int], None]]:
    """Shows how many behaviors have been read, and of a source of known size per cent and remaining time.

    Args:
        title: what is being done.
        total: the size; None if unknown.
        size: what it is counted in; ``bytes`` are shown as kB, MB, GB.

    Yields:
        Called with the behaviors done so far, and how much of `total` that is.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        *([TaskProgressColumn()] if total is not None else []),
        *([DownloadColumn()] if size == "bytes" else []),
        TextColumn("{task.fields[behaviors]:,} behaviors"),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if total is not None else []),
    )
    with Progress(*columns, console=console) as display:
        task = display.add_task(title, total=total, behaviors=0)
        yield lambda behaviors, done: display.update(task, completed=done, behaviors=behaviors)
