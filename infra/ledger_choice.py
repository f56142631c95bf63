"""Where the ledger of promotions is kept, and why: the database that UNFREEZE_LEDGER_URL names, else S3, else a file in the home."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sqlalchemy.engine import URL

from infra import settings
from infra.ledger import Ledger
from infra.ledger_in_sql import SqlLedger, database_url, shown
from infra.ledger_on_s3 import S3Ledger
from infra.object_store import S3ObjectStore, enforces_write_if_absent, join_uri, object_store


@dataclass(frozen=True)
class Choice:
    """A place for the ledger; `where` and `why` are words to show, without secrets. `database` is None where it is S3."""

    database: URL | None
    where: str
    why: str


def choose(storage: str) -> Choice:
    """Where the ledger of the models below `storage` is kept. Raises UserError or ServiceError where that cannot be told."""
    named = settings.load().ledger_url
    if named:
        url = database_url(named.get_secret_value())
        return Choice(url, shown(url), "UNFREEZE_LEDGER_URL names it")
    if enforces_conditional_writes(storage):
        return Choice(None, join_uri(storage, "ledger"), "the object store enforces conditional writes (probed)")
    url = URL.create("sqlite", database=str(settings.home_dir() / "ledger.db"))
    why = (
        "the object store does not enforce conditional writes (probed); commands that share a store but not a home need UNFREEZE_LEDGER_URL"
    )
    return Choice(url, shown(url), why)


def open_ledger(storage: str) -> Ledger:
    """The ledger of the models below `storage`."""
    database = choose(storage).database
    return _ledger_on_s3(object_store(), storage) if database is None else SqlLedger(database, object_store(), storage)


@cache
def _ledger_on_s3(store: S3ObjectStore, storage: str) -> S3Ledger:
    """One a process: it knows what it has read."""
    return S3Ledger(store, storage)


@cache
def enforces_conditional_writes(storage: str) -> bool:
    """What the store answered to a probe, asked once a process."""
    return enforces_write_if_absent(object_store(), join_uri(storage, "probes", "if-none-match"))
