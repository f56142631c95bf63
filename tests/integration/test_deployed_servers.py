"""What compose.yaml starts, started here without containers: its commands, its variables and its health checks, on a real PostgreSQL.

S3 and Ray are left out: what they are given is in tests/unit/test_manifests.py, and the embedded stack's tests run both.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest

from tests import manifests, postgresql

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgresql.programs() is None or shutil.which("psql") is None, reason="PostgreSQL is not installed"),
]

TIMEOUT_S = 540
SECRETS = {name: f"s3cret/of:{name}" for name, value in manifests.example_variables().items() if not value}
"""With letters that a URL would take for its own."""


@dataclass(frozen=True)
class Site:
    """Where the services of the compose file are on this machine, instead of in containers."""

    folder: Path
    ports: dict[str, int]

    def here(self, text: str) -> str:
        """A word of the compose file, with the hosts and ports of this machine."""
        hosts = {"5432": "postgres", "5000": "mlflow", "4200": "prefect", "8080": "worker"}
        for name in hosts.values():
            text = text.replace(f"@{name}:", "@127.0.0.1:").replace(f"//{name}:", "//127.0.0.1:")
        text = re.sub("|".join(hosts), lambda port: str(self.ports[hosts[port.group()]]), text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def environment(self, service: str) -> dict[str, str]:
        said = manifests.compose(manifests.example_variables() | SECRETS)["services"][service]["environment"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_", "RAY_", "PG"))}
        local = {
            "HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / service),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "ui"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "UNFREEZE_HOME": str(self.folder / "home"),
        }
        given = {
            name: "127.0.0.1" if value == "postgres" and name.endswith("_HOST") else self.here(str(value)) for name, value in said.items()
        }
        return kept | local | given

    def health(self, service: str) -> str:
        return self.here(manifests.compose(manifests.example_variables() | SECRETS)["services"][service]["healthcheck"]["test"][-1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as exits:
        site = Site(tmp_path_factory.mktemp("site"), {name: free_port() for name in ("postgres", "mlflow", "prefect", "worker")})
        exits.enter_context(postgresql.server(site.ports["postgres"]))
        make_databases(site, SECRETS)
        side_by_side = [exits.enter_context(running(site, service)) for service in ("mlflow", "prefect")]
        for service, process in zip(("mlflow", "prefect"), side_by_side, strict=True):
            await_health(site, service, process)
        await_health(site, "worker", exits.enter_context(running(site, "worker")))
        yield site


def test_mlflow_answers_by_its_name_and_to_nobody_who_calls_it_otherwise(site: Site) -> None:
    url = f"http://127.0.0.1:{site.ports['mlflow']}/api/2.0/mlflow/experiments/create"
    assert httpx.post(url, json={"name": "pets"}, headers={"Host": f"mlflow:{site.ports['mlflow']}"}).status_code == 200
    assert httpx.post(url, json={"name": "dogs"}, headers={"Host": "elsewhere.example"}).status_code == 403


def test_the_worker_has_made_its_pool(site: Site) -> None:
    url, deadline = f"http://127.0.0.1:{site.ports['prefect']}/api/work_pools/unfreeze", time.monotonic() + TIMEOUT_S
    while (answer := httpx.get(url)).status_code == 404 and time.monotonic() < deadline:  # it is healthy a moment before
        time.sleep(0.5)
    assert (answer.json()["name"], answer.json()["type"]) == ("unfreeze", "process")


def test_the_ledger_is_where_the_worker_is_told_and_its_password_is_in_no_url(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.ledger_in_sql import database_url

    variables = site.environment("worker")
    assert SECRETS["LEDGER_DB_PASSWORD"] not in variables["UNFREEZE_LEDGER_URL"]
    monkeypatch.setenv("PGPASSWORD", variables["PGPASSWORD"])
    url = database_url(variables["UNFREEZE_LEDGER_URL"]).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT current_user, current_database()").fetchone() == ("ledger", "ledger")


@pytest.mark.parametrize(("role", "database"), [("mlflow", "ledger"), ("prefect", "ledger"), ("ledger", "mlflow"), ("mlflow", "postgres")])
def test_no_role_sees_or_rules_what_is_not_its_own(site: Site, role: str, database: str) -> None:
    address = {"host": "127.0.0.1", "port": site.ports["postgres"], "user": role, "password": SECRETS[f"{role.upper()}_DB_PASSWORD"]}
    if database == "postgres":
        with psycopg.connect(dbname=role, **address) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE ROLE another")
    else:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(dbname=database, **address)


def test_a_missing_password_ends_the_script_before_it_makes_anything(site: Site) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make_databases(site, {**SECRETS, "PREFECT_DB_PASSWORD": ""})
    assert "PREFECT_DB_PASSWORD is not set." in failed.value.stdout


def make_databases(site: Site, passwords: dict[str, str]) -> None:
    """What PostgreSQL's image does with the script on an empty volume."""
    address = {"PGHOST": "127.0.0.1", "PGPORT": str(site.ports["postgres"]), "PGPASSWORD": postgresql.PASSWORD, "POSTGRES_USER": "team"}
    environment = {"PATH": os.environ["PATH"], **passwords, **address}
    subprocess.run([manifests.BASE / "databases.sh"], env=environment, check=True, capture_output=True, text=True)


@contextmanager
def running(site: Site, service: str) -> Iterator[subprocess.Popen[bytes]]:
    """The service's process."""
    said = manifests.compose(manifests.example_variables() | SECRETS)["services"][service]
    command = [str(Path(sys.executable).parent / said["command"][0]), *(site.here(part) for part in said["command"][1:])]
    with (site.folder / f"{service}.log").open("w") as log:
        process = subprocess.Popen(command, env=site.environment(service), cwd=site.folder, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def await_health(site: Site, service: str, process: subprocess.Popen[bytes]) -> None:
    """Return when its health check is content."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if httpx.get(site.health(service), timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None, (site.folder / f"{service}.log").read_text()
        assert time.monotonic() < deadline, (site.folder / f"{service}.log").read_text()
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
