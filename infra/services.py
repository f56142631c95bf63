"""The four servers of the embedded stack: how each is started on loopback, where it answers, and how to see that it is well."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import sys
import urllib.request
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import ServiceError
from infra.settings import ServiceName

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
OBJECT_STORE_BYTES = 1 << 30
CHECK_TIMEOUT_S = 3.0
OWN_PORTS = (20_000, 32_768)
PORTS: dict[ServiceName, tuple[str, ...]] = {
    "s3": ("s3",),
    "mlflow": ("mlflow",),
    "prefect": ("prefect",),
    "ray": ("ray", "ray_dashboard", "ray_client", "ray_agent"),
}
GRACE_S: dict[ServiceName, float] = {"s3": 2.0, "mlflow": 3.0, "prefect": 5.0, "ray": 1.0}
"""Between TERM and KILL. Ray keeps nothing that a later command needs, and would drain for up to 30 s."""

NO_PHONING_HOME = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
PERSONAL_AWS = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
"""The user's own AWS settings that would spoil or redirect requests to the embedded S3."""


@dataclass(frozen=True)
class Site:
    """What outlives a start: where the data is, which credentials and ports this home uses."""

    home: Path
    access_key: str
    secret_key: str
    ports: dict[str, int]
    artifacts_uri: str
    num_cpus: float | None = None

    @property
    def ray_token_file(self) -> Path:
        return self.home / "ray-token"

    def log(self, service: ServiceName) -> Path:
        return self.home / "logs" / f"{service}.log"


def address(service: ServiceName, ports: dict[str, int]) -> str:
    """Where an outside client finds the service."""
    port = ports[service]
    return {
        "s3": f"http://{HOST}:{port}",
        "mlflow": f"http://{HOST}:{port}",
        "prefect": f"http://{HOST}:{port}/api",
        "ray": f"{HOST}:{port}",
    }[service]


def client_environment(service: ServiceName, site: Site) -> dict[str, str | None]:
    """The variables a client of the embedded service needs; None where one must not be set."""
    where = address(service, site.ports)
    if service == "s3":
        return {
            **dict.fromkeys(PERSONAL_AWS),
            "AWS_ENDPOINT_URL": where,
            "AWS_ENDPOINT_URL_S3": None,
            "AWS_ACCESS_KEY_ID": site.access_key,
            "AWS_SECRET_ACCESS_KEY": site.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
        }
    if service == "mlflow":
        return {"MLFLOW_TRACKING_URI": where, "MLFLOW_REGISTRY_URI": None}
    if service == "prefect":
        return {"PREFECT_API_URL": where, "PREFECT_API_KEY": None, "PREFECT_HOME": str(site.home / "prefect")}
    return {"RAY_ADDRESS": where, **ray_environment(site)}


def ray_environment(site: Site) -> dict[str, str | None]:
    """What Ray's servers and drivers must agree on.

    The variable with Windows in its name is the one that keeps Ray on loopback: without it Ray turns 127.0.0.1 into the machine's
    address and listens on every interface.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": None,
        "RAY_AUTH_TOKEN_PATH": str(site.ray_token_file),
    }


def server_environment(service: ServiceName, site: Site, s3: dict[str, str | None]) -> dict[str, str]:
    """The whole environment of the server; `s3` are the variables of its S3. Secrets pass here, never as arguments."""
    strangers = ("RCLONE_", "PREFECT_", "MLFLOW_", "_MLFLOW_", "RAY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(strangers)}
    environment |= NO_PHONING_HOME | {"PYTHONUNBUFFERED": "1", "NO_PROXY": no_proxy(), "no_proxy": no_proxy()}
    if service == "s3":
        return environment | {"RCLONE_AUTH_KEY": f'"{site.access_key},{site.secret_key}"', "RCLONE_CONFIG": ""}
    if service == "mlflow":
        return _changed(environment, s3) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if service == "prefect":
        return environment | _prefect_environment(site)
    # it would start a worker a core, too, without the environment that all of ours have, so that nobody uses them
    own = {"RAY_enable_metrics_collection": "0", "RAY_prestart_worker_first_driver": "0"}
    return _changed(environment, ray_environment(site)) | own


def no_proxy() -> str:
    """The hosts to reach without a proxy: the user's own, and loopback."""
    known = [host for host in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",") if host]
    return ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def command(service: ServiceName, site: Site, scratch: Path) -> list[str]:
    """The command line of the server; `scratch` is an empty folder with a short path that goes with it."""
    port = str(site.ports[service])
    if service == "s3":
        return [_program("rclone"), "serve", "s3", "--addr", f"{HOST}:{port}", str(site.home / "s3")]
    if service == "mlflow":
        return [sys.executable, "-m", "infra.mlflow_server", f"sqlite:///{site.home / 'mlflow.db'}", site.artifacts_uri, port]
    if service == "prefect":
        return [_program("prefect"), "server", "start", "--host", HOST, "--port", port]
    return _ray_command(site, scratch)


def prepare(service: ServiceName, site: Site) -> None:
    """The folders that must be there before the server starts."""
    for folder in {"s3": ("s3",), "mlflow": (), "prefect": ("prefect",), "ray": ("ray/spilled",)}[service]:
        (site.home / folder).mkdir(parents=True, exist_ok=True)


def choose_ports(service: ServiceName, last: dict[str, int]) -> dict[str, int]:
    """A free loopback port for each of the service's ports. `last`: last time's, of all services; taken again where free and no other's."""
    chosen = dict(last)
    for name in PORTS[service]:
        taken = {port for other, port in chosen.items() if other != name}
        if name not in chosen or chosen[name] in taken or not _is_free(chosen[name]):
            chosen[name] = _free_port(taken)
    return {name: chosen[name] for name in PORTS[service]}


def new_credentials() -> tuple[str, str]:
    """A random access key and secret key."""
    return secrets.token_hex(10).upper(), secrets.token_urlsafe(30)


VITAL: dict[ServiceName, tuple[str, ...]] = {"ray": ("raylet", "gcs_server")}
"""Programs that a service's leader outlives in vain: Ray's raylet ends where one of its agents is killed, and `ray start` stays."""


def is_healthy(service: ServiceName, site: Site) -> bool:
    """Whether the server answers, and answers what it should."""
    if service == "s3":
        return _serves_s3(site)
    if service == "mlflow":
        return _get(f"http://{HOST}:{site.ports['mlflow']}/health") == b"OK"
    if service == "prefect":
        return _get(f"http://{HOST}:{site.ports['prefect']}/api/health") == b"true"
    return has_started_ray(site) and b"success" in _get(f"http://{HOST}:{site.ports['ray_dashboard']}/api/gcs_healthz")


def has_started_ray(site: Site) -> bool:
    """Whether Ray has said that all its parts are up: its first part answers long before the last."""
    try:
        return b"Ray runtime started." in site.log("ray").read_bytes()
    except FileNotFoundError:
        return False


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def _ray_command(site: Site, scratch: Path) -> list[str]:
    ports = site.ports
    arguments = {
        "--node-ip-address": HOST,
        "--port": ports["ray"],
        "--dashboard-host": HOST,
        "--dashboard-port": ports["ray_dashboard"],
        "--ray-client-server-port": ports["ray_client"],
        "--dashboard-agent-listen-port": ports["ray_agent"],
        "--temp-dir": scratch,
        "--object-spilling-directory": site.home / "ray" / "spilled",
        "--object-store-memory": OBJECT_STORE_BYTES,
        "--include-log-monitor": "false",
    } | ({} if site.num_cpus is None else {"--num-cpus": int(site.num_cpus)})
    given = [str(part) for pair in arguments.items() for part in pair]
    return [_program("ray"), "start", "--head", "--block", "--no-monitor", "--disable-usage-stats", "--log-style", "record", *given]


def _prefect_environment(site: Site) -> dict[str, str]:
    folder = site.home / "prefect"
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(site.ports["prefect"]),
        # in memory, the default, a restart forgets who is at work: Prefect would then end the flow runs of scheduled deployments
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"),  # the default is inside the installed package
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def _program(name: str) -> str:
    """The program of this environment, before one of the same name elsewhere."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise ServiceError(f"The program {name!r} is missing.", "Run `make setup`.")
    return found


def _changed(environment: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    merged: dict[str, str | None] = {**environment, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(taken: Collection[int]) -> int:
    """One that neither the kernel gives to whoever asks for any (our server binds it some seconds from now) nor Ray to its workers."""
    while (port := random.SystemRandom().randrange(*OWN_PORTS)) in taken or not _is_free(port):
        pass
    return port


def _get(url: str) -> bytes:
    """The body of a good answer, or nothing; never by way of a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=CHECK_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except (OSError, HTTPException):  # what is no HTTP is another's server
        return b""


def _serves_s3(site: Site) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        _s3_client(site).list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def ensure_buckets(site: Site, buckets: Iterable[str]) -> bool:
    """Make what buckets are missing on the embedded S3: by its own interface, because it remembers folders that it has listed.

    False where it did not answer in time, as on a machine that has too much to do.
    """
    from botocore.exceptions import BotoCoreError

    client = _s3_client(site)
    try:
        there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in set(buckets) - there:
            with suppress(client.exceptions.BucketAlreadyExists):  # by another command, since
                client.create_bucket(Bucket=bucket)
    except BotoCoreError:
        return False
    return True


def _s3_client(site: Site) -> S3Client:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=address("s3", site.ports),
        aws_access_key_id=site.access_key,
        aws_secret_access_key=site.secret_key,
        region_name=REGION,
        config=Config(connect_timeout=CHECK_TIMEOUT_S, read_timeout=CHECK_TIMEOUT_S, retries={"total_max_attempts": 1}, proxies={}),
    )
