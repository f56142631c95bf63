"""Data preparation in processes of this machine: for images that lie here, while the cluster is elsewhere and cannot see them."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from ray_jobs import prepare as plain
from ray_jobs.spec import Spec

if TYPE_CHECKING:
    from infra.progress import OnProgress

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2
"""Jobs a process that are read ahead, so that memory does not grow with the data."""


def prepare(spec: Spec, on_progress: OnProgress) -> dict[str, Any]:
    """Prepare the spec's source; see ray_jobs.prepare."""
    return plain.prepare(spec, on_progress, run=in_processes)


def in_processes(function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
    """Map over a process a core, in order, a bounded number in flight."""
    count = os.cpu_count() or 1
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:  # a fork would share S3 connections
        in_flight: deque[Future[Result]] = deque()
        for job in jobs:
            if len(in_flight) == AHEAD * count:
                yield in_flight.popleft().result()
            in_flight.append(pool.submit(function, job))
        while in_flight:
            yield in_flight.popleft().result()
