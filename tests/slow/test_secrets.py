"""Secrets stay where they belong: unmistakable ones are planted, whole jobs run and fail, and everything that was written is searched.

The files whose job is to hold credentials are KEEPERS: in a home of mode 0700, readable by their owner alone.
"""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra import stack_file
from tests import postgresql
from tests.conftest import RCLONE, _free_port, _wait_for_port
from tests.site import Site

pytestmark = pytest.mark.slow

ACCESS_KEY, S3_SECRET, WRONG_S3_SECRET = "PLANTEDKEY", "planted-s3-secret-0a9f", "planted-wrong-s3-secret-77b1"
WEBHOOK_SECRET, WEBHOOK_TOKEN = "planted-webhook-secret-5c2e", "planted-webhook-token-91d4"
MLFLOW_PASSWORD, PREFECT_PASSWORD = "planted-mlflow-password-3e8d", "planted-prefect-password-b60c"
WRONG_LEDGER_PASSWORD = "planted-ledger-password-e417"
USER = "planted"
WEBHOOK = f"http://127.0.0.1:9/hooks/{WEBHOOK_TOKEN}"
"""Nobody listens there."""
KEEPERS = {"stack.json", "ray-token"}
WORKERS = "workers"
"""The folder with the way to S3 for Ray's workers; it is gone once the embedded Ray is."""
SAMPLE_S = 0.03


@dataclass
class World:
    """What was planted, and what was seen."""

    site: Site
    s3_root: Path
    planted: dict[str, list[bytes]]
    printed: dict[str, str] = field(default_factory=dict)
    command_lines: set[bytes] = field(default_factory=set)
    ray_files: dict[str, bytes] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    """Of the files with the way to S3 for Ray's workers, while they were there."""

    def found_in(self, content: bytes) -> list[str]:
        """Which secrets are in there."""
        return [name for name, forms in self.planted.items() if any(form in content for form in forms)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, postgresql_server: str) -> Iterator[World]:
    """A whole retraining with a secret wherever there can be one, and one command for each way to fail with a secret at hand."""
    folder = tmp_path_factory.mktemp("secrets")
    with s3_server(folder / "s3") as s3, watched() as command_lines:
        site = Site(folder)
        site.env |= s3 | {"UNFREEZE_LEDGER_URL": postgresql.new_database(postgresql_server), "UNFREEZE_WEBHOOK_SECRET": WEBHOOK_SECRET}
        site.run("up")
        status = site.json("status")
        planted = _planted(status["ray"]["token"])
        world = World(site, folder / "s3", planted, command_lines=command_lines)
        try:
            _run_everything(world, status)
            world.ray_files = _ray_files(site.folder / "home")
            world.modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (site.folder / "home" / WORKERS).iterdir()}
        finally:
            site.run("down")
        yield world


def _planted(ray_token: str) -> dict[str, list[bytes]]:
    basic = {MLFLOW_PASSWORD, PREFECT_PASSWORD}
    secrets = {
        "the S3 secret key": S3_SECRET,
        "a wrong S3 secret key": WRONG_S3_SECRET,
        "the ledger's password": postgresql.PASSWORD,
        "a wrong password of the ledger": WRONG_LEDGER_PASSWORD,
        "the webhook's secret": WEBHOOK_SECRET,
        "the token in the webhook's URL": WEBHOOK_TOKEN,
        "MLflow's password": MLFLOW_PASSWORD,
        "Prefect's password": PREFECT_PASSWORD,
        "Ray's token": ray_token,
    }
    return {
        name: [secret.encode(), *([b64encode(f"{USER}:{secret}".encode())] if secret in basic else [])] for name, secret in secrets.items()
    }


def _run_everything(world: World, status: dict[str, Any]) -> None:
    site = world.site
    mlflow = _with_password(status["mlflow"]["uri"], MLFLOW_PASSWORD)
    prefect = _with_password(status["prefect"]["api_url"], PREFECT_PASSWORD)
    away = {"MLFLOW_TRACKING_URI": _with_password("http://127.0.0.1:9", MLFLOW_PASSWORD), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    nobody = {"PREFECT_API_URL": _with_password("http://127.0.0.1:9/api", PREFECT_PASSWORD)}
    lost_ledger = {"UNFREEZE_LEDGER_URL": f"postgresql://team:{WRONG_LEDGER_PASSWORD}@127.0.0.1:9/ledger"}
    wrong_secret = {"AWS_SECRET_ACCESS_KEY": WRONG_S3_SECRET}
    small = {"search__lr": [1e-2], "search__max_epochs": 1, "fit__max_epochs": 1}
    spec = site.spec("planted", {"promotion": {"webhook": WEBHOOK}}, **small)
    for what, expect, env, arguments in (
        ("a retraining", 0, {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect}, ("--debug", "retrain", spec)),
        ("a doctor", None, {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect}, ("--debug", "doctor")),
        ("a deployment", 0, {}, ("--debug", "deploy", spec, "--cron", "0 2 1 1 *")),
        ("a wrong S3 secret", 2, wrong_secret, ("--debug", "retrain", spec)),
        ("MLflow away", 3, away, ("--debug", "history", "planted")),
        ("MLflow away in a flow", 3, away, ("--debug", "retrain", spec)),
        ("Prefect away", None, nobody, ("--debug", "retrain", spec)),
        ("the ledger away", 3, lost_ledger, ("--debug", "history", "planted")),
        ("the ledger away in a flow", 3, lost_ledger, ("--debug", "promote", "planted", "--version", "1")),
    ):
        done = site.attempt(*arguments, **env)
        world.printed[what] = done.stdout + done.stderr
        assert expect in (None, done.returncode), f"{what}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def _with_password(url: str, password: str) -> str:
    return url.replace("http://", f"http://{USER}:{password}@")


def _ray_files(home: Path) -> dict[str, bytes]:
    """What Ray has written, but for its sockets."""
    scratch = stack_file.read(home).servers["ray"].scratch
    return {str(path): path.read_bytes() for path in scratch.rglob("*") if path.is_file() and not path.is_symlink()}


@contextmanager
def s3_server(root: Path) -> Iterator[dict[str, str]]:
    """The team's own S3, with the planted credentials."""
    (root / "unfreeze").mkdir(parents=True)
    port = _free_port()
    environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{S3_SECRET}"', "RCLONE_CONFIG": ""}
    command = [str(RCLONE), "serve", "s3", "--addr", f"127.0.0.1:{port}", str(root)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait()


@contextmanager
def watched() -> Iterator[set[bytes]]:
    """Every command line that any process of this machine has shown meanwhile, as `ps` would see it."""
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_S):
            for process in Path("/proc").iterdir():
                if process.name.isdigit():
                    try:
                        seen.add((process / "cmdline").read_bytes())
                    except OSError:  # it has ended
                        continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def leaks(
    world: World, contents: Iterable[tuple[str, Callable[[], bytes]]], allowed: Callable[[str], set[str]] = lambda _: set()
) -> list[str]:
    return [f"{place}: {name}" for place, read in contents for name in world.found_in(read()) if name not in allowed(place)]


def assert_none(found: list[str]) -> None:
    assert not found, "\n".join(sorted(found))


def test_no_command_line_shows_a_secret(world: World) -> None:
    lines = [(line.replace(b"\0", b" ").decode(errors="replace")[:160], lambda line=line: line) for line in world.command_lines]
    assert any("raylet" in line for line, _ in lines)
    assert_none(leaks(world, lines))


def test_nothing_that_a_command_says_holds_a_secret_not_even_with_debug(world: World) -> None:
    assert_none(leaks(world, [(what, text.encode) for what, text in world.printed.items()]))
    assert "Traceback" in world.printed["MLflow away"]


def test_no_file_of_the_home_but_the_keepers_holds_a_secret(world: World) -> None:
    home = world.site.folder / "home"
    files = [path for path in sorted(home.rglob("*")) if path.is_file() and path.name not in KEEPERS]
    written = {str(path.relative_to(home)) for path in files}
    assert {"mlflow.db", "prefect/prefect.db", "logs/mlflow.log", "logs/prefect.log", "logs/ray.log", "logs/worker.log"} <= written
    assert any(name.startswith("reports/") for name in written)
    # Prefect keeps a flow run's values, the spec among them, and shows them to whoever may start it: the webhook's URL is one
    allowed = {"the token in the webhook's URL"}
    found = leaks(
        world, [(str(path), path.read_bytes) for path in files], lambda place: allowed if "/prefect/prefect.db" in place else set()
    )
    assert_none(found)


def test_the_keepers_are_their_owners_alone(world: World) -> None:
    home = world.site.folder / "home"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for name in KEEPERS:
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name
    assert set(world.modes.values()) == {0o600}
    assert not (home / WORKERS).exists()


def test_no_object_on_s3_holds_a_secret(world: World) -> None:
    objects = [path for path in sorted(world.s3_root.rglob("*")) if path.is_file()]
    places = {path.relative_to(world.s3_root / "unfreeze").parts[0] for path in objects}
    assert {"models", "datasets", "features", "searches", "fits", "mlflow", "ledger"} <= places
    assert [path for path in objects if path.name == "report.html"]

    def allowed(place: str) -> set[str]:
        """A rollback tells the webhook that the spec has named: the lineage keeps the spec."""
        return {"the token in the webhook's URL"} if place.endswith("/lineage.json") else set()

    assert_none(leaks(world, [(str(path), path.read_bytes) for path in objects], allowed))


def test_nothing_that_ray_writes_holds_a_secret(world: World) -> None:
    assert any("raylet" in path for path in world.ray_files)
    assert_none(leaks(world, [(path, lambda data=data: data) for path, data in world.ray_files.items()]))
