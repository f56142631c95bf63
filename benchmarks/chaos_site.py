"""What chaos works on: one home whose stack stays up, an S3 server of its own behind a proxy that can fail, and the whole job on it.

S3 is external to the stack, so that it can be broken apart from it: the command, its workers and MLflow reach it through the proxy; who
looks at results asks the server itself, or reads its files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench import ROOT
from search_against_peers import write_images

sys.path.append(str(ROOT))  # tests/ is no installed package

from tests.faults import FaultProxy, JumpingClock, SmallDisk

UNFREEZE, RCLONE = (str(Path(sys.executable).with_name(name)) for name in ("unfreeze", "rclone"))
BUCKET = "unfreeze"
CACHE_BYTES = 192 * 2**20
TIMEOUT_S = 1800.0
POLL_S = 0.02
ROUND = "UNFREEZE_CHAOS_ROUND"
"""In the environment of a round's commands, by which their processes are found."""


class S3Server:
    """rclone, as a server of the team's own that its host starts again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        (folder / BUCKET).mkdir(parents=True)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [RCLONE, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", str(self.folder)]
        environment = {**os.environ, "RCLONE_AUTH_KEY": '"CHAOS,CHAOSSECRET"', "RCLONE_CONFIG": ""}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not _listens(self.port):
            if self.process.poll() is not None:
                raise RuntimeError(f"rclone ended with {self.process.returncode}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def have(self) -> None:
        """Start it where it does not run."""
        if self.process.poll() is not None:
            self.start()


@dataclass
class Command:
    """One attempt at the job, its lines in files beside the spec."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def lines(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int | None:
        """Its exit status, or None where it hung and was killed for it."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


class Site:
    """The home, the images, the services and what can break them. Use within `site`."""

    def __init__(self, folder: Path, seed: int, disk: SmallDisk, clock: JumpingClock) -> None:
        self.folder, self.seed, self.disk, self.clock = folder, seed, disk, clock
        self.images = write_images(folder / "images", 24).parent
        self.s3 = S3Server(folder / "s3")
        self.proxy = FaultProxy(self.s3.endpoint)
        keys = {"AWS_ACCESS_KEY_ID": "CHAOS", "AWS_SECRET_ACCESS_KEY": "CHAOSSECRET", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys | {"UNFREEZE_HOME": str(folder / "home"), "UNFREEZE_CACHE_DIR": str(disk.folder)})
        self.env = {**os.environ, "AWS_ENDPOINT_URL": self.proxy.endpoint}
        os.environ["AWS_ENDPOINT_URL"] = self.s3.endpoint
        self.timers: list[threading.Timer] = []
        self.commands: list[Command] = []

    def spec(self, name: str, scheduler: str) -> Path:
        content = {
            "name": name, "storage": f"s3://{BUCKET}/{name}", "backbone": {"name": "resnet10t", "weights": "none"},
            "data": {"source": str(self.images), "image_size": 32, "val_fraction": 0.2, "holdout_fraction": 0.2},
            "search": {
                "unfreeze_depth": [0, 1], "lr": [1e-2, 1e-3], "max_epochs": 3, "batch_size": 16, "scheduler": scheduler, "seed": self.seed,
            },
            "fit": {"num_workers": 2, "max_epochs": 2, "patience": 2, "batch_size_per_worker": 16},
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, spec: Path, attempt: int = 1, env: Mapping[str, str] | None = None) -> Command:
        """The whole job."""
        out, log = spec.with_suffix(f".{attempt}.json"), spec.with_suffix(f".{attempt}.log")
        with out.open("wb") as stdout, log.open("wb") as stderr:
            environment = {**self.env, ROUND: str(spec), **(env or {})}
            process = subprocess.Popen([UNFREEZE, "retrain", str(spec), "--json"], env=environment, stdout=stdout, stderr=stderr)
        self.commands.append(Command(process, out, log))
        return self.commands[-1]

    def on_s3(self, name: str) -> Path:
        """Where S3 keeps the files of one round's storage."""
        return self.s3.folder / BUCKET / name

    def leader(self, server: str) -> psutil.Process | None:
        """The process of one of the stack's servers, or None where it does not run."""
        known = self.stack["servers"].get(server)
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(known["leader"]["pid"]) if known else None
            if process and abs(process.create_time() - known["leader"]["create_time"]) < 2:
                return process
        return None

    @property
    def stack(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "home" / "stack.json").read_text()))

    def family(self, server: str) -> list[psutil.Process]:
        """A server's process and all that came of it."""
        leader = self.leader(server)
        with suppress(psutil.NoSuchProcess):
            return [leader, *leader.children(recursive=True)] if leader else []
        return []

    def later(self, seconds: float, then: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, then)
        self.timers.append(timer)
        timer.start()

    def heal(self) -> None:
        """Nothing is broken any more, and the next round finds what this one found."""
        for timer in self.timers:
            timer.cancel()
            timer.join()
        self.timers.clear()
        self.proxy.clear()
        self.proxy.have()
        self.s3.have()
        self.disk.free()
        self.clock.jump(0)

    def clean(self) -> None:
        """Empty the scratch disk, and start again what does not run."""
        from infra import local_stack

        shutil.rmtree(self.disk.folder, ignore_errors=True)
        if any(row["state"] == "stopped" for row in local_stack.status().values()):
            subprocess.run([UNFREEZE, "up"], env=self.env, check=True, capture_output=True)


@contextmanager
def site(folder: Path, seed: int) -> Iterator[Site]:
    """A site whose stack is up, and is down afterwards."""
    with SmallDisk(folder / "cache", CACHE_BYTES) as disk:
        made = Site(folder, seed, disk, JumpingClock(folder))
        try:
            subprocess.run([UNFREEZE, "up"], env=made.env, check=True, capture_output=True)
            yield made
        finally:
            made.heal()
            for command in made.commands:  # what still runs would keep the stack
                command.process.kill()
                command.process.wait()
            subprocess.run([UNFREEZE, "down"], env=made.env, check=False, capture_output=True)
            made.proxy.refuse()
            made.s3.kill()


def called(process: psutil.Process) -> str:
    """The name that a process shows; Ray's workers say there what they do."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def kill(victims: list[psutil.Process]) -> bool:
    """Whether there was anything to kill."""
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    return bool(victims)


def one_of(victims: list[psutil.Process], rng: random.Random) -> list[psutil.Process]:
    return [rng.choice(victims)] if victims else []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
