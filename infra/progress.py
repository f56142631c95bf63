"""How far a long step has come: rich bars on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

OnProgress = Callable[[float, float], None]
"""Called with (done, total), in the same unit; total 0 means unknown."""
OnWait = Callable[[str, float], None]
"""Called with what is waited for ("" once it is there), and for how many seconds."""

PLAIN_INTERVAL_S = 5.0
WAIT_INTERVAL_S = 30.0
"""How often a plain line says what is waited for."""
console = Console(stderr=True, highlight=False)
log = logging.getLogger(__name__)


def ignore(done: float, total: float) -> None:
    """For callers that do not watch."""


def wait_unseen(what: str, seconds: float) -> None:
    """Likewise."""


def say(text: str) -> None:
    """One line for a person, above a bar that is being shown."""
    console.print(text)
    log.info(Text.from_markup(text).plain)


class Watcher:
    """Shows how far a step has come. Sent to another process it becomes one that shows nothing: a terminal does not travel."""

    def __init__(self, show: OnProgress, show_wait: OnWait = wait_unseen) -> None:
        self.show, self.show_wait = show, show_wait
        self.waited_for = ""

    def __call__(self, done: float, total: float) -> None:
        self.show(done, total)

    def waits(self, what: str, seconds: float) -> None:
        """Say what the step waits for, and for how long by now; an empty `what` says that it goes on."""
        if what != self.waited_for:
            self.waited_for = what
            log.info("waits" if what else "goes on", extra={"waits_for": what, "waited_s": round(seconds, 1)})
        self.show_wait(what, seconds)

    def __reduce__(self) -> tuple[type[Watcher], tuple[OnProgress]]:
        return Watcher, (ignore,)


@contextmanager
def step(title: str) -> Iterator[Watcher]:
    """Show one step while it runs: a bar with time left, or plain lines where stderr is no terminal."""
    log.info("%s ...", title)
    shown = _bar(title) if console.is_terminal else _lines(title)
    with shown as (show, show_wait):
        yield Watcher(show, show_wait)


def waiting(what: str, seconds: float) -> str:
    """As a person reads it."""
    return f"waiting for {what}, {seconds:.0f} s"


@contextmanager
def _bar(title: str) -> Iterator[tuple[OnProgress, OnWait]]:
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

        def on_wait(what: str, seconds: float) -> None:
            said = escape(waiting(what, seconds))
            progress.update(task, description=f"{title} [yellow]{said}[/]" if what else title)

        yield lambda done, total: progress.update(task, completed=done, total=total or None), on_wait
    console.print(f"[green]✓[/] {title} [dim]{time.monotonic() - started:.1f} s[/]")


@contextmanager
def _lines(title: str) -> Iterator[tuple[OnProgress, OnWait]]:
    started = last = time.monotonic()
    console.print(f"{title} ...")

    def on_progress(done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if total and done and now - last >= PLAIN_INTERVAL_S:
            last = now
            left_s = (now - started) * (total - done) / done
            console.print(f"{title}: {100 * done / total:.0f} %, {left_s:.0f} s left")

    said: tuple[str, float] = "", 0.0

    def on_wait(what: str, seconds: float) -> None:
        nonlocal said
        if what and (what != said[0] or seconds - said[1] >= WAIT_INTERVAL_S):
            console.print(f"{title}: {escape(waiting(what, seconds))}")
            said = what, seconds
        elif not what:
            said = "", 0.0

    yield on_progress, on_wait
    console.print(f"{title}: done in {time.monotonic() - started:.1f} s")
