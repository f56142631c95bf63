"""What a submitted job runs on the cluster: `python -m ray_jobs.job URI` does what the request in that folder asks, and leaves the outcome.

An error of ours arrives at the caller as itself. A job that is stopped leaves no outcome.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

from infra import logs, ray_cluster, usage
from infra.errors import UnfreezeError
from infra.object_store import object_store
from infra.progress import Watcher
from ray_jobs import job_environment
from ray_jobs.job_objects import JobObjects, Plain, Progress
from ray_jobs.waiting import waits_told
from ray_jobs.watch import Watch, Work
from ray_jobs.workers import take_usage

TELL_EVERY_S = 1.0
ROOT = Path(__file__).parents[1]


class _Teller:
    """Passes on what the work tells, at most once a second, so that a fast step does not spend its time writing objects."""

    def __init__(self, objects: JobObjects) -> None:
        self.objects, self.last, self.now = objects, 0.0, Progress()

    def on_progress(self, done: float, total: float) -> None:
        self.now = replace(self.now, done=done, total=total)
        if time.monotonic() - self.last >= TELL_EVERY_S:
            self._tell()

    def say(self, text: str) -> None:
        self.now = replace(self.now, said=[*self.now.said, text])
        self._tell()

    def waits(self, what: str, seconds: float) -> None:
        self.now = replace(self.now, waits_for=what, waited_s=seconds)
        self._tell()

    def _tell(self) -> None:
        self.objects.tell(self.now)
        self.last = time.monotonic()


def find(entry: str) -> Work:
    """The function that `module:name` names."""
    module, _, name = entry.partition(":")
    package = module.partition(".")[0]
    if not package.isidentifier() or not (ROOT / package).is_dir():  # whoever may write to S3 must not choose any function of Python's
        raise ValueError(f"{entry} is no work of ours")
    found: Work = getattr(importlib.import_module(module), name)
    return found


def run(uri: str) -> int:
    """Do what is asked; the exit code of the process, which Ray shows."""
    objects = JobObjects(object_store(), uri)
    entry, arguments = objects.request()
    teller = _Teller(objects)
    try:
        with ray_cluster.connect(), waits_told(Watch(Watcher(teller.on_progress), teller.say, teller.waits)) as watch:
            result: Plain = find(entry)(watch, **arguments)
            take_usage()
    except Exception as error:
        objects.fail(error, teller.now.said)
        logging.error("%s", error, exc_info=None if isinstance(error, UnfreezeError) else error)
        return error.exit_code if isinstance(error, UnfreezeError) else 1
    objects.succeed(result, teller.now.said, usage.so_far().plain())
    return 0


if __name__ == "__main__":
    job_environment.take()
    with logs.to_stream(sys.stderr), logs.within(job=sys.argv[1].rpartition("/")[2]):
        code = run(sys.argv[1])
    sys.exit(code)
