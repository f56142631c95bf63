"""A step's work as a job on a Ray cluster: submitted under a name made of its content, watched, taken up again, and stopped.

Who dies leaves the job running; whoever does the same step next finds it by its name. Who is cancelled or out of time stops it. A name
counts attempts, because Ray never takes a second job of one name: an attempt that is over is passed by, unless it has just succeeded
and nobody has read its outcome.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from infra import usage
from infra.errors import ServiceError, UnfreezeError, UserError
from infra.job_server import Job, JobServer
from infra.object_store import join_uri, object_store
from infra.ray_cluster import KEEP_BYTES, LOOPBACK, ROOT
from infra.usage import Usage
from ray_jobs import job_environment
from ray_jobs.job_objects import JobObjects, Plain, Progress, error_of
from ray_jobs.spec import digest_of
from ray_jobs.watch import Watch

PACKAGES = ("ray_jobs", "infra")
"""The code that goes with a job. The rest of the environment, Python and its packages, is the cluster's."""
FRESH_S = 3600.0
"""How long an outcome that nobody has read may be taken for the answer: the world changes, and to ask again is cheap."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
WAIT_SHARE = 0.05
"""Of the time that a job has taken so far: to notice its end late by as much is not felt, and a long job is asked for seldom."""
STOP_LOOKS = 60
PATIENCE_S = 60.0
"""How long the job server may be silent before the step fails; its job goes on meanwhile."""
NAMED = "unfreeze-"
"""How the ids of our jobs begin."""
FLOW_RUN = "unfreeze.flow_run_id"
CARRY_ON = "The same command carries on."
log = logging.getLogger(__name__)


class ThisProcess:
    """Which flow run submits jobs here, told to Ray with each; and which jobs it waits for, told by its heartbeat: nobody stops these."""

    flow_run_id = ""
    waits_for: set[str] = set()  # noqa: RUF012 - of the process, on purpose


@dataclass(frozen=True)
class _Call:
    """One step's work, and where it goes."""

    entry: str
    arguments: Plain
    server: JobServer
    storage: str
    packages: tuple[str, ...]

    @functools.cached_property
    def name(self) -> str:
        """The same for the same work of the same code."""
        content = [self.entry, self.arguments, self.storage, self.packages, _code_version(self.packages)]
        return f"{NAMED}{self.entry.rpartition(':')[2].replace('_', '-')}-{digest_of(content)[:16]}"

    def objects(self, job_id: str) -> JobObjects:
        return JobObjects(object_store(), join_uri(self.storage, "jobs", job_id))


def run_as_job(entry: str, arguments: Plain, *, address: str, storage: str, watch: Watch, packages: Sequence[str] = PACKAGES) -> Plain:
    """The result of the function `module:name`, computed by a job. Its errors are raised here as they were there."""
    server = JobServer(address)
    _require_reachable_store(server, os.environ)
    call = _Call(entry, arguments, server, storage, tuple(packages))
    while True:
        job_id, shown = _current(call), _Shown(watch)
        with _stopped_if_interrupted(server, job_id), _waiting_for(job_id):
            log.info("the Ray job of a step", extra={"job": job_id, "address": address})
            if server.find(job_id) is None:
                _submit(call, job_id)
            job = _await_end(call, job_id, shown)
        found = _taken(call, job, shown)
        if found is not None:
            return found


def _current(call: _Call) -> str:
    """The attempt that counts: one that runs, one that has just succeeded unread, or else the first that Ray does not know."""
    for attempt in itertools.count(1):
        job_id = f"{call.name}-{attempt}"
        job = call.server.find(job_id)
        if job is None or not job.is_over:
            return job_id
        if job.status == "SUCCEEDED" and _is_fresh(job) and call.objects(job_id).outcome() is not None:
            return job_id
    raise AssertionError("counts for ever")


def _is_fresh(job: Job) -> bool:
    return job.ended_at is not None and time.time() - job.ended_at < FRESH_S


def _submit(call: _Call, job_id: str) -> None:
    objects = call.objects(job_id)
    objects.ask(call.entry, call.arguments)
    variables = {"MALLOC_MMAP_THRESHOLD_": KEEP_BYTES, "MALLOC_TRIM_THRESHOLD_": KEEP_BYTES, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="unfreeze-job-") as scratch:
        folder = Path(scratch)
        for package in call.packages:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / job_environment.FILE).write_text(json.dumps(job_environment.given(os.environ)))
        command = f'"${{{job_environment.PYTHON}:-python}}" -m ray_jobs.job {shlex.quote(objects.uri)}'
        call.server.submit(
            job_id, command, folder=folder, variables=variables, hook=job_environment.HOOK, metadata={FLOW_RUN: ThisProcess.flow_run_id}
        )


def _await_end(call: _Call, job_id: str, shown: _Shown) -> Job:
    """Watch until the job is over, or has left a result: its process takes another second to leave, which nobody need wait for.

    Raises ServiceError where its server is silent for long, or has forgotten it.
    """
    began = heard_at = time.monotonic()
    with ThreadPoolExecutor(1, "look at a job") as looking:
        while True:
            try:
                # in a thread: a timeout of Prefect's, raised amid a request, would be taken for one of the network's, and be lost
                has_result, job, progress = looking.submit(_look, call, job_id).result()
                heard_at = time.monotonic()
            except ServiceError:
                if time.monotonic() - heard_at > PATIENCE_S:
                    raise
            else:
                if job is None:
                    raise ServiceError(f"The Ray cluster no longer knows the job {job_id}: its head was started anew.", CARRY_ON)
                if has_result or job.is_over:
                    return job
                shown.show(progress)
            time.sleep(min(max(FIRST_WAIT_S, WAIT_SHARE * (time.monotonic() - began)), LONGEST_WAIT_S))


def _look(call: _Call, job_id: str) -> tuple[bool, Job | None, Progress]:
    objects = call.objects(job_id)
    return "result" in (objects.outcome() or {}), call.server.find(job_id), objects.told()


class _Shown:
    """What of a job's progress a person has seen."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.lines = watch, 0

    def show(self, progress: Progress) -> None:
        for line in progress.said[self.lines :]:
            self.watch.say(line)
        self.lines = max(self.lines, len(progress.said))
        if progress.total:
            self.watch.on_progress(progress.done, progress.total)
        self.watch.waits(progress.waits_for, progress.waited_s)


def _taken(call: _Call, job: Job, shown: _Shown) -> Plain | None:
    """The result of a job that has ended; None where another caller has taken it. Raises what the job met."""
    objects = call.objects(job.id)
    outcome = objects.outcome()
    if outcome is not None:
        objects.delete()
        shown.show(Progress(said=outcome["said"]))
        if "error" in outcome:
            raise error_of(outcome["error"])
        usage.add(Usage(**outcome["used"]))
        result: Plain = outcome["result"]
        return result
    if job.status == "SUCCEEDED" or not job.is_over:
        return None
    if job.status == "STOPPED":
        raise ServiceError(f"The Ray job {job.id} was stopped.", CARRY_ON)
    raise ServiceError(f"The Ray job {job.id} failed: {_why(call.server, job)}", CARRY_ON)


def _why(server: JobServer, job: Job) -> str:
    log = ""
    with suppress(ServiceError):  # there is none where the job never started
        log = server.log_tail(job.id)
    return log or job.message


@contextmanager
def _waiting_for(job_id: str) -> Iterator[None]:
    ThisProcess.waits_for.add(job_id)
    try:
        yield
    finally:
        ThisProcess.waits_for.discard(job_id)


@contextmanager
def _stopped_if_interrupted(server: JobServer, job_id: str) -> Iterator[None]:
    """Cancelled, out of time or Ctrl-C: the job goes too. Where the services fail it stays, for the next try to take up."""
    try:
        yield
    except UnfreezeError:
        raise
    except BaseException:
        with suppress(ServiceError):
            _stop(server, job_id)
        raise


def _stop(server: JobServer, job_id: str) -> None:
    """Return when it has ended, so that the next try does not take up a job that is about to; Ray gives it a few seconds."""
    server.stop(job_id)
    for _ in range(STOP_LOOKS):
        job = server.find(job_id)
        if job is None or job.is_over:
            return
        time.sleep(FIRST_WAIT_S)


def _require_reachable_store(server: JobServer, environment: Mapping[str, str]) -> None:
    """An S3 on this machine's loopback is another one, or none, for a machine elsewhere."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    if (urlsplit(endpoint).hostname or "") in LOOPBACK and not server.is_on_loopback:
        raise UserError(
            f"The Ray cluster of {server.address} cannot reach the S3 at {endpoint}, which is this machine's alone.",
            "Name an S3 that both can reach with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )


@functools.cache
def _code_version(packages: tuple[str, ...]) -> str:
    """Names the code that goes with a job."""
    files = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    return digest_of([[str(path.relative_to(ROOT)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])
