"""A real PostgreSQL server for tests, from Debian's packages: fresh, on loopback, with a password, and gone afterwards."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

PASSWORD = "s3cret-of-the-tests"
START_TIMEOUT_S = 30


def programs() -> Path | None:
    """The folder of initdb and postgres (Debian keeps them out of the PATH), or None."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return candidates[-1] if candidates and (candidates[-1] / "postgres").exists() else None


@contextmanager
def server(port: int) -> Iterator[str]:
    """The server's URL without a database. Nothing is synchronised to disk: the tests kill clients, not the server."""
    binaries = programs()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short, and open to the other user: pytest's own folders are not
    other: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **other}
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data = folder / "data"
    try:
        secret = ["-U", "team", "-A", "scram-sha-256", "--pwfile", folder / "password"]
        subprocess.run([binaries / "initdb", "-D", data, *secret, "-E", "UTF8", "--locale=C", "--no-sync"], check=True, **quiet)
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "shared_buffers": "16MB"}
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        process = subprocess.Popen([binaries / "postgres", "-D", data, "-p", str(port), *given], **quiet)
        try:
            url = f"postgresql://team:{PASSWORD}@127.0.0.1:{port}"
            _wait(url)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # TERM would wait for clients that a failed test left behind
            process.wait()
    finally:
        shutil.rmtree(folder)


def new_database(server_url: str) -> str:
    """The URL of an empty database."""
    name = f"ledger_{secrets.token_hex(6)}"
    with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
    return f"{server_url}/{name}"


def _wait(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(f"{url}/postgres").close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
