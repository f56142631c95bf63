"""What the embedded stack remembers in UNFREEZE_HOME/stack.json: credentials, ports, who uses it and which processes it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from infra import processes, services
from infra.errors import ServiceError, UserError
from infra.processes import ProcessRecord
from infra.settings import ServiceName

LOCK_TIMEOUT_S = 120.0


class Holder(BaseModel):
    """One use of the stack by a living command, and the names of what it alone uses."""

    token: str
    process: ProcessRecord
    claims: list[str] = Field(default_factory=list)


class Server(BaseModel):
    """One started server: the process that leads it, what it has started, and its scratch folder."""

    leader: ProcessRecord
    members: list[ProcessRecord] = Field(default_factory=list)
    vital: list[ProcessRecord] = Field(
        default_factory=list, description="Members without which it does not serve, though its leader lives on."
    )
    scratch: Path


class StackFile(BaseModel):
    """The whole of stack.json."""

    access_key: str
    secret_key: str
    ports: dict[str, int] = Field(default_factory=dict)
    storage: str | None = None
    artifacts: dict[str, str] = Field(
        default_factory=dict, description="Where MLflow keeps its artifacts, by S3 address: it must not move later."
    )
    long_lived: bool = False
    holders: list[Holder] = Field(default_factory=list)
    servers: dict[ServiceName, Server] = Field(default_factory=dict)
    worker: ProcessRecord | None = Field(default=None, description="Prefect's worker, beside a stack that is up for long.")

    def living_holders(self) -> list[Holder]:
        return [holder for holder in self.holders if processes.is_alive(holder.process)]

    def runs(self, service: ServiceName) -> bool:
        server = self.servers.get(service)
        return server is not None and all(map(processes.is_alive, [server.leader, *server.vital]))


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Only one process at a time changes the stack of this home."""
    lock = FileLock(home / "stack.lock", timeout=LOCK_TIMEOUT_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise ServiceError(
            f"Another command has been starting or stopping the servers in {home} for {LOCK_TIMEOUT_S:.0f} s.", "Look at it, or end it."
        ) from None
    try:
        yield
    finally:
        lock.release()


def read(home: Path) -> StackFile:
    """The remembered stack, or a new one with new credentials."""
    path = home / "stack.json"
    try:
        return StackFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        access_key, secret_key = services.new_credentials()
        return StackFile(access_key=access_key, secret_key=secret_key)
    except ValidationError as error:
        raise UserError(f"{path} cannot be read: {error}", "Stop what still runs, then delete the file; the data stay.") from error


def write(home: Path, stack: StackFile) -> None:
    """Remember the stack: written aside, then renamed, so that a reader never sees half of it."""
    write_private(home / "stack.json", stack.model_dump_json(indent=1))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(aside, path)
