"""The seam to Ray's job server: where it is, and submit, look, stop and read logs there, each request within a bounded time."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from infra import ray_cluster
from infra.errors import ServiceError, UserError
from infra.ray_cluster import CHECK_ALIVE, LOOPBACK

JOB_SERVER = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for it; it goes before RAY_ADDRESS, as in Ray's own commands."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 60.0
HTTP = ("http://", "https://")
TELL_OF_UPLOADS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Job:
    """A submitted job as its server tells of it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED: Ray's words."""
    message: str
    ended_at: float | None
    """In seconds since 1970, by the clock of the cluster."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status not in ("PENDING", "RUNNING")


def named() -> str | None:
    """The job server or cluster to which work goes as jobs; None where this process connects itself, as on the embedded Ray.

    Raises UserError for an address of Ray's client: all data would pass through one connection, and the work end with it.
    """
    address = os.environ.get(JOB_SERVER) or os.environ.get("RAY_ADDRESS") or ""
    if address.startswith(HTTP):
        return address.rstrip("/")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} is no address for this: work sent through Ray's client ends with the connection.",
            "Name the cluster's job server, http://HOST:8265, or the cluster itself, HOST:6379.",
        )
    if not address or address in ("auto", "local") or _host(address) in LOOPBACK:
        return None
    return address


class JobServer:
    """The job server of one cluster."""

    def __init__(self, address: str) -> None:
        """`address` is what `named` gives: of the server itself, or of the cluster, which is asked where its server is."""
        ray_cluster.see_todays_variables()
        self.address = address if address.startswith(HTTP) else _asked(address)
        _require_answer(self.address)
        with _translated(self.address), _named_by_ray(self.address):
            from ray.job_submission import JobSubmissionClient

            for chatty in TELL_OF_UPLOADS:
                logging.getLogger(chatty).setLevel(logging.WARNING)
            self._client = JobSubmissionClient(self.address)
        # Ray's client knows no timeout, and a server that hangs would hold a command forever
        self._client._do_request = partial(self._client._do_request, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))  # type: ignore[method-assign]

    @property
    def is_on_loopback(self) -> bool:
        return (urlsplit(self.address).hostname or "") in LOOPBACK

    def find(self, job_id: str) -> Job | None:
        """The job; None where the server has never heard of it."""
        with _translated(self.address):
            try:
                found = self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return _job(job_id, found)

    def unfinished(self) -> list[Job]:
        """The submitted jobs that wait or run, whoever has submitted them."""
        with _translated(self.address):
            found = [_job(told.submission_id, told) for told in self._client.list_jobs() if told.submission_id]
        return [job for job in found if not job.is_over]

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        folder: Path,
        variables: Mapping[str, str],
        hook: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Start `entrypoint` in a copy of `folder`; harmless where a job of this id is there already.

        `hook` is what each of its processes calls first. Variables and metadata can be read by whoever may ask the server.
        """
        from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

        # Ray passes the hook on to the workers of the job, but not to the process that starts it, which needs it too
        passed_on = {**variables, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook}
        environment: dict[str, Any] = {"working_dir": str(folder), "env_vars": passed_on, "worker_process_setup_hook": hook}
        with _translated(self.address):
            try:
                told = {**(metadata or {}), ray_cluster.WHO: ray_cluster.whoami()}
                self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=told)
            except RuntimeError:
                if self.find(job_id) is None:  # else another caller was first, or the answer to a request of ours was lost
                    raise

    def stop(self, job_id: str) -> None:
        """Ask the job to end; it gets some seconds to tidy up."""
        with _translated(self.address):
            self._client.stop_job(job_id)

    def log_tail(self, job_id: str, lines: int = 12) -> str:
        """The last lines that the job wrote."""
        with _translated(self.address):
            return "\n".join(self._client.get_job_logs(job_id).splitlines()[-lines:])


def _job(job_id: str, told: Any) -> Job:
    ended_at = told.end_time / 1000 if told.end_time else None
    return Job(job_id, str(getattr(told.status, "value", told.status)), told.message or "", ended_at, told.metadata or {})


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _asked(address: str) -> str:
    """The job server of a cluster HOST:PORT. Raises ServiceError where it listens on the loopback of another machine only."""
    ray_cluster.require_answer(address)
    with _translated(address), _named_by_ray(None):
        from ray.dashboard.utils import ray_address_to_api_server_url

        found = str(ray_address_to_api_server_url(address))
    if (urlsplit(found).hostname or "") in LOOPBACK and not _is_of_this_machine(_host(address)):
        raise ServiceError(
            f"The Ray cluster at {address} answers, but its job server listens on its own loopback only ({found}).",
            "Start the head with `ray start --head --dashboard-host=0.0.0.0`.",
        )
    return found


def _is_of_this_machine(host: str) -> bool:
    """Whether a name or an address is one of this machine's own."""
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    try:
        return any(str(found[4][0]) in own for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def _require_answer(address: str) -> None:
    """Any answer will do, also a refusal: what follows says that better."""
    deadline, last = time.monotonic() + ray_cluster.CONNECT_TIMEOUT_S, ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_TIMEOUT_S):
                return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            last = str(getattr(error, "reason", error))
            time.sleep(0.5)
    raise ServiceError(f"No Ray job server answers at {address}: {last}.", CHECK_ALIVE)


@contextmanager
def _named_by_ray(address: str | None) -> Iterator[None]:
    """Ray's client prefers these variables to what it is told."""
    with _one_at_a_time:
        before = {name: os.environ.pop(name, None) for name in (JOB_SERVER, "RAY_ADDRESS")}
        if address:
            os.environ[JOB_SERVER] = address
        try:
            yield
        finally:
            os.environ.pop(JOB_SERVER, None)
            os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into ours."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ServiceError(f"Ray at {address} refused the token: {str(error).splitlines()[0]}", CHECK_ALIVE) from None
    except (requests.exceptions.RequestException, ConnectionError, RuntimeError) as error:
        raise ServiceError(f"The Ray job server at {address} did not do what it was asked: {error}", CHECK_ALIVE) from error
