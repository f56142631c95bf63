"""What work used: bytes to and from S3, requests, those that were asked again, and the CPUs and GPUs it held.

Each process counts for itself, where it happens. What a worker used comes back beside its result (ray_jobs/workers.py) and is added
here, so the counts of the process that runs the steps tell of everything it had done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Sums; `cpu_s` and `gpu_s` are devices held times seconds, whether or not they were busy."""

    s3_read_bytes: int = 0
    s3_written_bytes: int = 0
    s3_requests: int = 0
    s3_retries: int = 0
    cpu_s: float = 0.0
    gpu_s: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


class _Process:
    """The counts of this process."""

    total = Usage()
    one_at_a_time = threading.Lock()


def add(more: Usage) -> None:
    """Count it."""
    with _Process.one_at_a_time:
        _Process.total += more


def so_far() -> Usage:
    """Everything since this process began; the difference of two is what was used in between."""
    return _Process.total


@contextmanager
def holding(each: Mapping[str, float], count: int = 1) -> Iterator[None]:
    """Count `count` times these resources ("cpu", "gpu", in any case) for as long as the body takes."""
    amounts = {name.lower(): amount * count for name, amount in each.items()}
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - started
        add(Usage(cpu_s=seconds * amounts.get("cpu", 0.0), gpu_s=seconds * amounts.get("gpu", 0.0)))


def metered(work: Callable[..., T], each: Mapping[str, float], *arguments: object) -> tuple[T, Usage]:
    """What the work gives, and what this process used meanwhile, with these resources held."""
    before = so_far()
    with holding(each):
        result = work(*arguments)
    return result, so_far() - before
