"""The seam to Ray: connect this process to the cluster of RAY_ADDRESS, quietly and within a bounded time, and say what it has."""

from __future__ import annotations

import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import logs, ray_watch, worker_environment
from infra.errors import ServiceError, UnfreezeError
from infra.settings import cache_dir, home_dir, user

CONNECT_TIMEOUT_S = 15.0
ATTEMPT_TIMEOUT_S = 5.0
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
CHECK_ALIVE = "Check that the Ray cluster is up, and RAY_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN; the same command carries on."
ROOT = Path(__file__).parents[1]
INSIDE_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets for the process of a submitted job."""
WHO = "unfreeze"
"""Under this name each of our commands tells the cluster in words who it is: whoever waits for it reads them."""
_keeps_open: ContextVar[bool] = ContextVar("keeps_open", default=False)
KEEP_BYTES = str(1024**3)
"""glibc hands large freed blocks back to the system at once, and torch asks for the same again a moment later: see docs/LOG.md."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": KEEP_BYTES, "MALLOC_TRIM_THRESHOLD_": KEEP_BYTES}
FOR_WORKERS = ("AWS_", "UNFREEZE_CACHE_DIR", "UNFREEZE_S3_DEADLINE_S", "RAY_USAGE_STATS_ENABLED", "NO_PROXY", "no_proxy")


@dataclass(frozen=True)
class Cluster:
    """What the cluster has in all, whether or not it is in use."""

    address: str
    cpus: float
    gpus: float

    @property
    def on_this_machine(self) -> bool:
        return self.address.rpartition(":")[0] in LOOPBACK


@contextmanager
def connect() -> Iterator[Cluster]:
    """Connect to the cluster of RAY_ADDRESS for the body. Raises ServiceError where it does not answer."""
    _await_opening()
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise ServiceError("RAY_ADDRESS is not set.", "Name a cluster as host:port, or run inside the embedded stack.")
    see_todays_variables()
    import ray

    if ray.is_initialized():  # a caller further out holds the connection
        if ray_watch.is_gone(address):
            raise ray_watch.gone(address)
        yield _described(address)
        return
    require_answer(address)
    given: dict[str, Any] = {}
    if INSIDE_A_JOB not in os.environ:  # a job's processes have theirs already
        from ray.job_config import JobConfig

        given = {"runtime_env": runtime_environment(address), "job_config": JobConfig(metadata={WHO: whoami()})}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **given)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ServiceError(f"Ray at {address} refused this process: {error}", CHECK_ALIVE) from error
    try:
        yield _described(address)
    finally:
        if not _keeps_open.get():
            ray.shutdown()


def whoami() -> str:
    """This command and its user, in words."""
    return f"{logs.ids().get('command', 'a command')} of {user()}"


def living() -> dict[str, dict[str, float]]:
    """What each machine of the connected cluster has in all, in use or not, by its id; without those about to be taken away."""
    import ray
    from ray._private.state import state

    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    leaving = state.get_draining_nodes()
    return {node["NodeID"]: dict(node["Resources"]) for node in nodes if node["Alive"] and node["NodeID"] not in leaving}


def machines() -> list[dict[str, float]]:
    """What each machine has in all."""
    return list(living().values())


@contextmanager
def one_connection(then: Callable[[Cluster], None]) -> Iterator[None]:
    """For the body, what the first `connect` opens stays open: workers with torch loaded outlive the step that started them.

    The connection is opened at once in a thread, which then calls `then`, while the caller goes on with something else.
    """
    token = _keeps_open.set(True)
    _Opening.thread = threading.Thread(target=contextvars.copy_context().run, args=(_open, then), name="connect to Ray", daemon=True)
    _Opening.thread.start()
    try:
        with ray_watch.watched(os.environ.get("RAY_ADDRESS", "")):
            yield
    finally:
        _await_opening()
        _keeps_open.reset(token)
        if "ray" in sys.modules:
            import ray

            ray.shutdown()


class _Opening:
    """The thread that opens the one connection."""

    thread: threading.Thread | None = None


def _open(then: Callable[[Cluster], None]) -> None:
    with suppress(UnfreezeError), connect() as cluster:  # whoever connects next meets the same error, and tells it
        then(cluster)


def _await_opening() -> None:
    thread = _Opening.thread
    if thread is not None and thread is not threading.current_thread():
        thread.join()
        _Opening.thread = None


def runtime_environment(address: str) -> dict[str, Any]:
    """What every worker gets: the way to S3, the cache, and, on machines other than this one, our code."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(FOR_WORKERS) and name != "AWS_CA_BUNDLE"}
    if address.rpartition(":")[0] in LOOPBACK:
        path = worker_environment.keep(home_dir(), {**variables, "UNFREEZE_CACHE_DIR": str(cache_dir())})
        known = {worker_environment.PATH: str(path), **ALLOCATOR}
        return {"env_vars": known, "worker_process_setup_hook": worker_environment.HOOK}
    return {"env_vars": {**variables, **ALLOCATOR}, "py_modules": [str(ROOT / "ray_jobs"), str(ROOT / "infra")]}


def _described(address: str) -> Cluster:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    return Cluster(address, float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def see_todays_variables() -> None:
    """Make Ray see today's variables: it reads these once, on import, which may have been before the embedded stack set them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or ray.init warns about a coming default
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a compiled module

    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK_ONLY, "1") != "0"
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def require_answer(address: str) -> None:
    """Ask the head who it is. Ray itself would go on asking for many minutes, and write each time about it."""
    if "://" in address or address in {"auto", "local"}:
        return None
    deadline, last = time.monotonic() + CONNECT_TIMEOUT_S, "no answer"
    while time.monotonic() < deadline:
        try:
            return _ask(address)
        except _SilentError as error:
            last = str(error)
            time.sleep(0.5)
    raise ServiceError(f"No Ray cluster answers at {address}: {last}.", CHECK_ALIVE)


class _SilentError(Exception):
    """The head has not answered this time."""


def _ask(address: str) -> None:
    import grpc  # type: ignore[import-untyped]  # it has no stubs
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [(name.lower(), value) for name, value in get_auth_headers_if_auth_enabled({}).items()]
    with grpc.insecure_channel(canonicalize_bootstrap_address(address), options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        try:
            question = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]  # protobuf makes it when it is loaded
            stub.GetClusterId(question, timeout=ATTEMPT_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ServiceError(f"Ray at {address} refused the token: {error.details()}.", CHECK_ALIVE) from None
            raise _SilentError(f"{error.code().name.lower()}: {error.details()}") from None
