"""A cluster of hosts on this machine: each has its own address, processes, name, /tmp and shared memory, and none has our code.

The host `services` has S3, MLflow and Prefect, `head` the head of Ray, `one`, `two`, ... a node of Ray with one CPU each. Commands run on
yet another: the world itself, on its own side of the bridge. To be used within `own_world.py`, which ends it all.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.e2e.own_world import BRIDGE, NETWORK, NEW

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
OURS = ("flows", "tasks", "ray_jobs", "infra", "tests")
LAST_OF_ADDRESS = {"services": 2, "head": 10, "one": 11, "two": 12, "three": 13, "four": 14}
START_TIMEOUT_S = 300
S3_PORT, MLFLOW_PORT, PREFECT_PORT, RAY_PORT, JOB_SERVER_PORT = 9000, 5000, 4200, 6379, 8265
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "3"}
"""Ray declares a host that is silent dead after some 15 s, instead of a minute."""


@dataclass(frozen=True)
class Host:
    """One machine of the bed."""

    name: str
    folder: Path
    """Its /tmp."""
    life: subprocess.Popen[bytes]
    first: int
    """Process id, as the world sees it, of the host's first process: all others end with it."""
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{NETWORK}.{LAST_OF_ADDRESS[self.name]}"

    def start(self, program: str, *arguments: object, env: Mapping[str, str]) -> None:
        """Start a server there, one of this environment's programs; it writes to a log in the host's folder."""
        known = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **QUIET}
        command = [*self._within(), str(PROGRAMS / program), *map(str, arguments)]
        with (self.folder / f"{program}.log").open("ab") as log:
            self.servers[program] = subprocess.Popen(command, env=known | env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def do(self, script: str) -> None:
        """Run a shell script there, to its end."""
        subprocess.run([*self._within(), "sh", "-ec", script], check=True)

    def cut_off(self) -> None:
        """Its cable is pulled: all that runs on it runs on, and reaches nobody."""
        _ip("link", "set", f"to-{self.name}", "down")

    def power_off(self) -> None:
        """It is gone, and its processes with it."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.first).kill()
        for process in (self.life, *self.servers.values()):
            process.wait()

    def runs(self, name: str) -> bool:
        """Whether a process there calls itself something with `name` in it."""
        here = _processes_of(self.first)
        return bool(here) and any(name in _title(process) and _processes_of(process.pid) == here for process in psutil.process_iter())

    def _within(self) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--net", "--mount", "--pid", "--uts"]


@dataclass
class Bed:
    """The hosts, and the way to what they serve."""

    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    key: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def job_server(self) -> str:
        return f"http://{self.hosts['head'].address}:{JOB_SERVER_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a command that uses all of it; Ray's cluster by its own address."""
        services = self.hosts["services"].address
        return {
            **self._s3(),
            "MLFLOW_TRACKING_URI": f"http://{services}:{MLFLOW_PORT}",
            "PREFECT_API_URL": f"http://{services}:{PREFECT_PORT}/api",
            "RAY_ADDRESS": f"{self.hosts['head'].address}:{RAY_PORT}",
            **self._ray(),
            **QUIET,
        }

    def start(self) -> None:
        """Everything, with the nodes `one` and `two` beside the head; returns when all of it answers."""
        services, head = self._new_host("services"), self._new_host("head")
        self._start_services(services)
        dashboard = ("--dashboard-host", head.address, "--dashboard-port", JOB_SERVER_PORT)
        self._start_ray(head, "--head", "--port", RAY_PORT, *dashboard, cpus=0)  # it is for the processes that watch
        self._until(lambda: _answers(f"{self.job_server}/api/version"), "Ray's head")
        self.add_node("one")
        self.add_node("two")
        self._until(lambda: self.nodes() == 3, "Ray's nodes")
        urls = (f"{self.environment['MLFLOW_TRACKING_URI']}/health", f"{self.environment['PREFECT_API_URL']}/health")
        self._until(lambda: all(_answers(url) for url in (*urls, self._s3()["AWS_ENDPOINT_URL"])), "S3, MLflow and Prefect")

    def add_node(self, name: str) -> None:
        """Another host with a node of Ray; returns before it has joined."""
        self._start_ray(self._new_host(name), "--address", self.environment["RAY_ADDRESS"])

    def nodes(self) -> int:
        """How many living nodes Ray knows, its head among them."""
        found = self._asked("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in found)

    def jobs(self) -> dict[str, str]:
        """The state of every job that was ever submitted, by its id."""
        return {job["submission_id"]: job["status"] for job in self._asked("/api/jobs/") if job["submission_id"]}

    def where(self, name: str) -> set[str]:
        """The hosts on which a process calls itself something with `name` in it."""
        return {host.name for host in self.hosts.values() if host.runs(name)}

    def last_words(self) -> str:
        """The end of every log, for whoever must see why something failed."""
        logs = sorted(self.folder.glob("*/*.log"))
        return "\n".join(f"== {log.relative_to(self.folder)}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _new_host(self, name: str) -> Host:
        folder = self.folder / name
        (folder / "nothing").mkdir(parents=True)
        folder.chmod(0o1777)
        life = _new_life(folder / "host.log")
        host = Host(name, folder, life, psutil.Process(life.pid).children()[0].pid)
        self.hosts[name] = host
        _ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.first))
        _ip("link", "set", f"to-{name}", "master", BRIDGE, "up")
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{last} {one}\n" for one, last in LAST_OF_ADDRESS.items())
        )
        mounts = {"/etc/hosts": folder / "hosts", **{ROOT / part: folder / "nothing" for part in OURS}, "/tmp": folder}
        steps = [
            *(f"hostname {name}", "ip link set lo up", f"ip addr add {host.address}/24 dev eth0", "ip link set eth0 up"),
            *("mount -t tmpfs none /dev/shm", *(f"mount --bind {what} {where}" for where, what in mounts.items())),
        ]
        host.do("; ".join(steps))
        return host

    def _start_services(self, host: Host) -> None:
        (host.folder / "s3" / "unfreeze").mkdir(parents=True)
        credentials = {"RCLONE_AUTH_KEY": f'"bed,{self.key}"'}
        host.start("rclone", "serve", "s3", "--addr", f"{host.address}:{S3_PORT}", "/tmp/s3", env=credentials)
        kept = ("--backend-store-uri", "sqlite:////tmp/mlflow.db", "--artifacts-destination", "s3://unfreeze/mlflow")
        job_free = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        host.start("mlflow", "server", "--host", host.address, "--port", MLFLOW_PORT, "--workers", 1, *kept, env=self._s3() | job_free)
        home = {"PREFECT_HOME": "/tmp/prefect", "PREFECT_SERVER_UI_STATIC_DIRECTORY": "/tmp/prefect/ui"}
        host.start("prefect", "server", "start", "--host", host.address, "--port", PREFECT_PORT, env=home)

    def _start_ray(self, host: Host, *arguments: object, cpus: int = 1) -> None:
        common = ("--node-ip-address", host.address, "--num-cpus", cpus, "--object-store-memory", 200_000_000, "--temp-dir", "/tmp/ray")
        host.start(
            "ray", "start", "--block", "--disable-usage-stats", "--include-log-monitor", "false", *common, *arguments, env=self._ray()
        )

    def _ray(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_enable_metrics_collection": "0", **SOON}

    def _s3(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.hosts['services'].address}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": "bed",
            "AWS_SECRET_ACCESS_KEY": self.key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _asked(self, path: str) -> Any:
        answer = requests.get(self.job_server + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def _until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = [
                f"{name} on {host.name}" for host in self.hosts.values() for name, one in host.servers.items() if one.poll() is not None
            ]
            if ended or time.monotonic() > deadline:
                raise TimeoutError(f"Waited for {what}; ended: {', '.join(ended) or 'nothing'}.\n{self.last_words()}")
            time.sleep(0.3)


@contextmanager
def cluster_bed(folder: Path) -> Iterator[Bed]:
    """The bed, with everything on it answering; nothing of it runs after the body."""
    bed = Bed(folder)
    try:
        bed.start()
        yield bed
    finally:
        for host in bed.hosts.values():
            host.power_off()


def _new_life(log: Path) -> subprocess.Popen[bytes]:
    """A host without a network yet; its first process, the child of this one, does nothing."""
    command = ["unshare", "--uts", *NEW, "sh", "-c", "echo; exec sleep infinity"]
    with log.open("wb") as file:
        life = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file)
    assert life.stdout is not None
    with life.stdout as said:
        assert said.readline(), log.read_text()
    return life


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _answers(url: str) -> bool:
    """Whether anybody is there; a refusal will do."""
    try:
        requests.get(url, timeout=5)
    except requests.RequestException:
        return False
    return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _processes_of(pid: int) -> str:
    """Names the processes among which this one lives, that is, its host; empty where it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
