"""Places where a ledger is kept, to test with: S3 that enforces conditional writes, SQLite, PostgreSQL, and the object store in memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from infra.ledger import Content, Ledger
from infra.ledger_in_sql import TABLE, SqlLedger, database_url
from infra.ledger_on_s3 import S3Ledger, entry_uri
from infra.object_store import ObjectStore, object_store
from tests import postgresql
from tests.fakes import MemoryObjectStore

MODEL = "emoji"
AT = "2026-11-21T19:15:58.123456+00:00"


@dataclass(frozen=True)
class World:
    """One ledger's place; `store` is None where each process makes its own from the AWS_* variables."""

    kind: str
    storage: str
    database: str | None = None
    memory: MemoryObjectStore | None = None

    @property
    def store(self) -> ObjectStore:
        return self.memory or object_store()

    def open(self) -> Ledger:
        """As a process does that has just started."""
        return SqlLedger(database_url(self.database), self.store, self.storage) if self.database else S3Ledger(self.store, self.storage)

    def uri(self, number: int, model: str = MODEL) -> str:
        """Where the entry, or its copy, lies on S3."""
        return entry_uri(self.storage, model, number)

    def put(self, number: int, data: bytes, model: str = MODEL) -> None:
        """Write the bytes of an entry behind the ledger's back, where the truth is."""
        if self.database is None:
            return self.store.write(self.uri(number, model), data)
        row = (TABLE.c.model == model) & (TABLE.c.number == number)
        with self._connected() as connection:
            connection.execute(sa.delete(TABLE).where(row))
            connection.execute(sa.insert(TABLE).values(model=model, number=number, entry=data))
        return None

    def remove(self, number: int, model: str = MODEL) -> None:
        """Delete an entry behind the ledger's back."""
        if self.database is None:
            return self.store.delete([self.uri(number, model)])
        with self._connected() as connection:
            connection.execute(sa.delete(TABLE).where((TABLE.c.model == model) & (TABLE.c.number == number)))
        return None

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        assert self.database
        with sa.create_engine(database_url(self.database), poolclass=sa.NullPool).begin() as connection:
            yield connection


def make_world(kind: str, request: pytest.FixtureRequest, folder: Path) -> World:
    """A new place of this kind; the AWS_* variables of this process are set to its S3."""
    storage = f"s3://unfreeze/{secrets.token_hex(6)}"
    if kind == "memory":
        return World(kind, storage, memory=MemoryObjectStore())
    request.getfixturevalue("enforcing_s3" if kind == "s3" else "s3")
    if kind == "s3":
        return World(kind, storage)
    if kind == "sqlite":
        return World(kind, storage, f"sqlite:///{folder / 'ledger.db'}")
    return World(kind, storage, postgresql.new_database(request.getfixturevalue("postgresql_server")))


def content(to: str = "1", **changes: Any) -> Content:
    """What a promotion of version `to` says."""
    fields: dict[str, Any] = {
        "at": AT,
        "by": "ada",
        "verdict": "promoted",
        "from": None,
        "to": to,
        "reason": "accuracy 0.84 against 0.81",
        "evidence_uri": f"s3://unfreeze/models/emoji/{to}/evidence.json",
        "approver": None,
        "digests": {"data": "d" * 64, "spec": "5" * 64, "code": "c" * 40, "weights": "f" * 64},
    }
    return Content(**fields | changes)
