"""Fixtures that several suites share: real servers, started once and stopped by process id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import postgresql

# a busy machine fails nothing, and what passed passes again; other examples: pytest --hypothesis-profile=default
hypothesis.settings.register_profile("the same everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("the same everywhere")

ROOT = Path(__file__).resolve().parent.parent
RCLONE = Path(sys.executable).with_name("rclone")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (rclone) with one bucket, `unfreeze`; the AWS_* variables that reach it."""
    root = tmp_path_factory.mktemp("s3")
    (root / "unfreeze").mkdir()
    port = _free_port()
    command = [str(RCLONE), "serve", "s3", "--auth-key", "TESTKEY,TESTSECRET", "--addr", f"127.0.0.1:{port}", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "TESTKEY",
            "AWS_SECRET_ACCESS_KEY": "TESTSECRET",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The S3 server as this process's own."""
    from infra.object_store import object_store

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    object_store.cache_clear()
    yield s3_server
    object_store.cache_clear()


@pytest.fixture(scope="session")
def enforcing_s3_server() -> Iterator[dict[str, str]]:
    """A real S3 server (moto) that enforces conditional writes, with one bucket, `unfreeze`; the AWS_* variables that reach it."""
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.enforcing_s3", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "TESTKEY",
            "AWS_SECRET_ACCESS_KEY": "TESTSECRET",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def enforcing_s3(enforcing_s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The S3 server that enforces conditional writes as this process's own."""
    from infra.object_store import object_store
    from infra.s3_client import new_client

    for name, value in enforcing_s3_server.items():
        monkeypatch.setenv(name, value)
    object_store.cache_clear()
    new_client().create_bucket(Bucket="unfreeze")
    yield enforcing_s3_server
    object_store.cache_clear()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A real PostgreSQL server; its URL without a database."""
    if postgresql.programs() is None:
        if os.environ.get("UNFREEZE_TEST_TOOLS") == "required":
            pytest.fail("UNFREEZE_TEST_TOOLS=required, and there is no PostgreSQL")
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with postgresql.server(_free_port()) as url:
        yield url


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")
