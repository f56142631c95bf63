"""The ledger in a database, SQLite or PostgreSQL: the primary key (model, number) makes the insertion of a row the commit.

The objects `ledger/NAME/000001.json` on S3 are copies for readers. Crash order: the row first, then its copy. A copy that is missing
is written by the next append or read; one that differs is left as it is, for `verify` to tell. So is a copy without a row, unless
the database knows nothing of the model: then it is new, and takes over the chain that the copies hold, if that verifies.

Whoever only promotes needs no more rights than SELECT and INSERT on the table once it exists.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from infra.errors import ServiceError, UnfreezeError, UserError
from infra.ledger import Content, Entry, Finding, Kept, conflict, damaged, encode, next_entry, trusted, verify
from infra.ledger_on_s3 import entry_uri, numbers_on_s3, read_from_s3
from infra.object_store import ObjectStore

BUSY_TIMEOUT_S = 60
"""How long one waits for the others who write to the same SQLite file."""
POSTGRESQL_ARGUMENTS = {"connect_timeout": 10, "prepare_threshold": None}  # poolers between us and the server know no prepared statements
LOST_ATTEMPTS = 3

TABLE = sa.Table(
    "unfreeze_ledger",
    sa.MetaData(),
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),  # the very bytes of the copy on S3, so that no encoding comes between
)
# SQLite keeps a value of any type in any column: whatever is there, its bytes are read
BYTES = sa.cast(TABLE.c.entry, sa.LargeBinary).label("entry")
log = logging.getLogger(__name__)


def database_url(text: str) -> URL:
    """The address of a database, as the tools write it. Raises UserError that does not repeat it: it may hold a password."""
    way_out = "Write UNFREEZE_LEDGER_URL as postgresql://user:password@host:5432/database or sqlite:////absolute/path.db."
    try:
        url = make_url(text)
        backend = {"postgres": "postgresql"}.get(url.drivername, url.get_backend_name())
    except (ArgumentError, ValueError):
        raise UserError("UNFREEZE_LEDGER_URL is no address of a database.", way_out) from None
    if "@" in (url.host or ""):
        raise UserError("UNFREEZE_LEDGER_URL has more than one @.", "Write an @ in the password as %40.")
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or url.database in {None, "", ":memory:"}:
        raise UserError(f"UNFREEZE_LEDGER_URL names {backend}, where no ledger can be kept.", way_out)
    return url.set(drivername="sqlite")


def shown(url: URL) -> str:
    """The address without what is secret in it."""
    return URL.create(url.get_backend_name(), url.username, None, url.host, url.port, url.database).render_as_string()


class SqlLedger:
    """One table; `store` and `storage` say where the copies go. Each use opens a connection of its own: any thread may."""

    def __init__(self, url: URL, store: ObjectStore, storage: str) -> None:
        self.url = url
        self.store = store
        self.storage = storage

    def entries(self, model: str) -> list[Entry]:
        copied = numbers_on_s3(self.store, self.storage, model)  # before the rows: whatever has a copy had a row first
        rows = self._rows(model)
        if copied - rows.keys():
            rows = self._take_over(model, rows)
        entries = trusted(model, rows)
        self._copy_missing(model, rows, copied)
        return entries

    def append(self, model: str, content: Content, expected_number: int) -> Entry:
        places = (expected_number - 1, expected_number)
        copied = {number for number in places if self.store.exists(entry_uri(self.storage, model, number))}
        if copied != self._rows(model, *places).keys():
            self.entries(model)  # a copy is missing, or this database is not the one that the copies were made of
        entry = self._commit(model, content, expected_number)
        self._copy_missing(model, {expected_number: encode(entry)}, ())
        return entry

    def kept(self, model: str) -> Kept:
        copies = read_from_s3(self.store, self.storage, model)
        rows = self._rows(model)
        if not verify(rows):
            copies |= self._copy_missing(model, rows, copies.keys())
        return Kept(rows, copies)

    def _rows(self, model: str, *numbers: int) -> dict[int, bytes]:
        """The rows of these numbers, by number; all of the model where none is named."""
        wanted = (TABLE.c.model == model) & (TABLE.c.number.in_(numbers) if numbers else sa.true())
        with self._connected() as connection:
            return {row.number: row.entry for row in connection.execute(sa.select(TABLE.c.number, BYTES).where(wanted))}

    def _commit(self, model: str, content: Content, number: int) -> Entry:
        """Insert the row. Where the connection is lost meanwhile, once more: the row may be there, and then with the same bytes."""
        for attempt in range(1, LOST_ATTEMPTS + 1):
            try:
                with self._engine.connect() as connection:
                    entry = next_entry(model, content, number, _row(connection, model, number - 1))
                    if (there := _insert(connection, model, number, encode(entry))) != encode(entry):
                        raise conflict(model, number, there)
                    return entry
            except DBAPIError as error:
                if not error.connection_invalidated or attempt == LOST_ATTEMPTS:
                    raise self._failure(error) from None
        raise AssertionError("unreachable")

    def _take_over(self, model: str, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        """The rows, once a database that knows nothing of the model has got the chain that the copies hold."""
        copies = read_from_s3(self.store, self.storage, model)
        if rows:
            unknown = sorted(copies.keys() - rows.keys())
            raise damaged(
                model, [Finding(number, f"there is a copy on S3, but it is missing from {shown(self.url)}") for number in unknown]
            )
        trusted(model, copies)
        with self._connected() as connection, suppress(IntegrityError):  # another took it over first
            values = [{"model": model, "number": number, "entry": data} for number, data in copies.items()]
            connection.execute(sa.insert(TABLE).values(values))  # one statement: the whole chain or nothing of it
        return self._rows(model)

    def _copy_missing(self, model: str, rows: Mapping[int, bytes], copied: Collection[int]) -> dict[int, bytes]:
        """Copy the rows that lack one. A copy that fails waits for the next use: the entry is committed all the same, and can be read."""
        missing = {number: data for number, data in rows.items() if number not in copied}
        try:
            for number, data in missing.items():
                self.store.write_if_absent(entry_uri(self.storage, model, number), data)
        except UnfreezeError as error:
            log.warning("The ledger of %s could not be copied to S3: %s", model, error)
            return {}
        return missing

    @cached_property
    def _engine(self) -> sa.Engine:
        """Every statement is its own transaction: none can be left open by a machine that dies."""
        arguments = {"timeout": BUSY_TIMEOUT_S} if self.url.get_backend_name() == "sqlite" else POSTGRESQL_ARGUMENTS
        engine = sa.create_engine(self.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args=arguments)
        try:
            _make_table(engine)
        except SQLAlchemyError as error:
            raise self._failure(error) from None
        return engine

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise self._failure(error) from None

    def _failure(self, error: SQLAlchemyError) -> ServiceError:
        """The error to show: the database's own words without the statement, and without the password should they hold it."""
        words = " ".join(str(getattr(error, "orig", None) or error).split())
        for secret in (self.url.password, *self.url.query.values()):
            words = words.replace(str(secret), "***") if secret else words
        return ServiceError(
            f"The ledger's database {shown(self.url)} failed: {words}",
            f"Check UNFREEZE_LEDGER_URL, that the server is up, and that its user may create {TABLE.name} (once), read it and insert. "
            "The same command carries on.",
        )


def _make_table(engine: sa.Engine) -> None:
    if sa.inspect(engine).has_table(TABLE.name):
        return
    try:
        with engine.connect() as connection:
            connection.execute(CreateTable(TABLE, if_not_exists=True))
    except DBAPIError:
        if not sa.inspect(engine).has_table(TABLE.name):  # PostgreSQL: one of two who create it at once may fail all the same
            raise


def _row(connection: sa.Connection, model: str, number: int) -> bytes | None:
    return connection.execute(sa.select(BYTES).where(TABLE.c.model == model, TABLE.c.number == number)).scalar()


def _insert(connection: sa.Connection, model: str, number: int, data: bytes) -> bytes | None:
    """What the row holds then: `data`, or what was there first."""
    try:
        connection.execute(sa.insert(TABLE).values(model=model, number=number, entry=data))
    except IntegrityError:
        return _row(connection, model, number)
    return data
