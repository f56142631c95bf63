"""How far a long step has come: rich bars on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OnProgress = Callable[[float, float], None]
"""Called with (done, total), in the same unit; total 0 means unknown."""

PLAIN_INTERVAL_S = 5.0
console = Console(stderr=True, highlight=False)


def ignore(done: float, total: float) -> None:
    """For callers that do not watch."""


def say(text: str) -> None:
    """One line for a person, above a bar that is being shown."""
    console.print(text)


class Watcher:
    """Shows how far a step has come. Sent to another process it becomes one that shows nothing: a terminal does not travel."""

    def __init__(self, show: OnProgress) -> None:
        self.show = show

    def __call__(self, done: float, total: float) -> None:
        self.show(done, total)

    def __reduce__(self) -> tuple[type[Watcher], tuple[OnProgress]]:
        return Watcher, (ignore,)


@contextmanager
def step(title: str) -> Iterator[OnProgress]:
    """Show one step while it runs: a bar with time left, or plain lines where stderr is no terminal."""
    shown = _bar(title) if console.is_terminal else _lines(title)
    with shown as show:
        yield Watcher(show)


@contextmanager
def _bar(title: str) -> Iterator[OnProgress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
    console.print(f"[green]✓[/] {title} [dim]{time.monotonic() - started:.1f} s[/]")


@contextmanager
def _lines(title: str) -> Iterator[OnProgress]:
    started = last = time.monotonic()
    console.print(f"{title} ...")

    def on_progress(done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if total and done and now - last >= PLAIN_INTERVAL_S:
            last = now
            left_s = (now - started) * (total - done) / done
            console.print(f"{title}: {100 * done / total:.0f} %, {left_s:.0f} s left")

    yield on_progress
    console.print(f"{title}: done in {time.monotonic() - started:.1f} s")
