"""How a process of the embedded stack starts: it waits until it is on record, and outlives the command that starts it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GATE = 'read -r _ && exec "$@" </dev/null'
"""Run by a shell as the process's first life: nothing happens before a line comes, and nothing at all where the writer has died."""


def launch(command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, log: Path, remember: Callable[[int], None]) -> None:
    """Start `command` once `remember` has put its process id on record."""
    with _new_log(log) as file:
        child = subprocess.Popen(
            ["/bin/sh", "-c", GATE, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the command, which still needs the servers to clean up
            umask=0o077,
        )
    remember(child.pid)
    assert child.stdin is not None
    with child.stdin as gate:
        gate.write(b"\n")
    child.returncode = 0  # it may outlive this command: infra.processes ends and reaps it, so this object must not warn that it still runs


@contextmanager
def _new_log(path: Path) -> Iterator[Any]:
    """An empty log; the one of the start before is kept beside it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.exists():
        path.replace(path.with_suffix(".log.1"))
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        yield file
