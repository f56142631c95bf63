"""Where a step's work on Ray runs: in this process with its own connection, or as a job on the cluster that RAY_ADDRESS names.

Both give the same results, errors and progress (tests/contract/test_ray_work.py). Only plain values go in and come out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from infra import job_server, ray_cluster
from ray_jobs.watch import Watch, Work
from tasks.ray_job import PACKAGES, run_as_job

Plain = dict[str, Any]


def in_this_process() -> bool:
    """Whether this process itself is connected to Ray: on the embedded Ray, or another of this machine."""
    return job_server.named() is None


def run_on_ray(work: Work, arguments: Plain, *, storage: str, watch: Watch, packages: Sequence[str] = PACKAGES) -> Plain:
    """`work(watch, **arguments)` on Ray; the objects of a job lie below `storage`, and `packages` are the code that goes with it.

    The work must be harmless to repeat: where a caller died, another takes up its job, or starts one that finds the results.
    """
    arguments = _plain(arguments)
    address = job_server.named()
    if address is None:
        with ray_cluster.connect():
            from ray_jobs.waiting import waits_told
            from ray_jobs.workers import take_usage

            with waits_told(watch) as told:
                result = work(told, **arguments)
            take_usage()
            return _plain(result)
    entry = f"{work.__module__}:{work.__qualname__}"
    return run_as_job(entry, arguments, address=address, storage=storage, watch=watch, packages=packages)


def _plain(values: Plain) -> Plain:
    """As they would arrive in another process. Raises TypeError where they are not plain."""
    found: Plain = json.loads(json.dumps(values))
    return found
