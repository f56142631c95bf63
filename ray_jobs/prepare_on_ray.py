"""Data preparation on a Ray cluster: the driver reads and ships bytes, tasks decode them (and read s3:// sources themselves)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from infra.errors import UnfreezeError
from ray_jobs import prepare as plain
from ray_jobs.spec import Spec
from ray_jobs.workers import submit

if TYPE_CHECKING:  # it loads rich, which workers do without
    from infra.progress import OnProgress

Job = TypeVar("Job")
Result = TypeVar("Result")
MIN_IN_FLIGHT, MAX_IN_FLIGHT = 4, 128


def prepare(spec: Spec, on_progress: OnProgress) -> dict[str, Any]:
    """Prepare the spec's source over the cluster that this process is connected to; see ray_jobs.prepare."""
    return plain.prepare(spec, on_progress, run=on_ray)


def on_ray(function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
    """Map over Ray tasks in order of completion, a bounded number in flight, so that neither side's memory grows with the data."""
    in_flight_limit = min(MAX_IN_FLIGHT, max(MIN_IN_FLIGHT, 2 * int(ray.cluster_resources().get("CPU", 1))))  # type: ignore[no-untyped-call]
    in_flight: list[Any] = []
    try:
        for job in jobs:
            if len(in_flight) == in_flight_limit:
                done, in_flight = ray.wait(in_flight)
                yield _result(done[0])
            in_flight.append(submit(function, job, name="prepare"))
        while in_flight:
            done, in_flight = ray.wait(in_flight)
            yield _result(done[0])
    finally:
        for reference in in_flight:  # after an error the rest is of no use
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnfreezeError):
            raise error.cause from None
        raise
