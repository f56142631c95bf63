"""The log of a command: one JSON object a line, each with the ids of what was under way when it was written.

A line is made with the standard `logging` in any module of ours; ids come from `within`, figures from `extra`. Servers and Ray's
processes keep logs of their own, which the log names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import IO

from infra.newest import keep_newest

OURS = ("flows", "tasks", "ray_jobs", "infra")
_ids: ContextVar[Mapping[str, object]] = ContextVar("log_ids", default=MappingProxyType({}))


def ids() -> Mapping[str, object]:
    """What is under way, by name."""
    return _ids.get()


@contextmanager
def within(**more: object) -> Iterator[None]:
    """Every line written by the body has these ids."""
    token = _ids.set({**_ids.get(), **more})
    try:
        yield
    finally:
        _ids.reset(token)


class Log:
    """The file of one command. It is named by the command's process at first, and by the flow run as soon as there is one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handler = logging.FileHandler(path, encoding="utf-8")

    def name_after(self, flow_run_id: str) -> None:
        """Go on in the log of this flow run; where it has one already (it is tried again), behind what is there."""
        target = self.path.with_name(f"{flow_run_id}.jsonl")
        if target == self.path:
            return
        self._handler.acquire()
        try:
            self._handler.close()
            with target.open("a", encoding="utf-8") as file:
                file.write(self.path.read_text(encoding="utf-8"))
            self.path.unlink()
            self.path, self._handler.baseFilename = target, str(target)  # it opens the file at the next line
        finally:
            self._handler.release()


class _Current:
    log: Log | None = None


def current() -> Log | None:
    """The log of this process's command."""
    return _Current.log


@contextmanager
def to_file(path: Path) -> Iterator[Log]:
    """Keep the body's lines in this file. Of its folder's logs, those of the last runs stay."""
    log = Log(path)
    keep_newest(path.parent, "*.jsonl")
    outer, _Current.log = _Current.log, log
    try:
        with _attached(log._handler):
            yield log
    finally:
        _Current.log = outer


@contextmanager
def to_stream(stream: IO[str]) -> Iterator[None]:
    """Write the body's lines there: in a job, to what Ray keeps as the job's log."""
    with _attached(logging.StreamHandler(stream)):
        yield


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Only to our own loggers: Prefect takes the root's handlers away when it is imported."""
    from pythonjsonlogger.json import JsonFormatter

    renamed = {"levelname": "level", "name": "from", "message": "what"}
    handler.setFormatter(JsonFormatter(["levelname", "name", "message"], timestamp="at", rename_fields=renamed))
    handler.addFilter(_with_ids)
    loggers = [logging.getLogger(name) for name in OURS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def _with_ids(record: logging.LogRecord) -> bool:
    for name, value in _ids.get().items():
        record.__dict__.setdefault(name, value)
    return True
