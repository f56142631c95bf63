"""Which ledger is used and why, and that no password is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import ledger_choice
from infra.errors import ServiceError, UserError
from infra.ledger_choice import choose, open_ledger
from infra.ledger_in_sql import SqlLedger, database_url, shown
from infra.ledger_on_s3 import S3Ledger
from tests.fakes import MemoryObjectStore
from tests.ledger_worlds import MODEL, content

STORAGE = "s3://unfreeze/team"


class _IgnoresConditions(MemoryObjectStore):
    def write_if_absent(self, uri: str, data: bytes) -> bool:
        self.write(uri, data)
        return True


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryObjectStore:
    return use(MemoryObjectStore(), monkeypatch, tmp_path)


def use(store: MemoryObjectStore, monkeypatch: pytest.MonkeyPatch, home: Path) -> MemoryObjectStore:
    monkeypatch.delenv("UNFREEZE_LEDGER_URL", raising=False)
    monkeypatch.setenv("UNFREEZE_HOME", str(home))
    monkeypatch.setattr(ledger_choice, "object_store", lambda: store)
    ledger_choice.enforces_conditional_writes.cache_clear()
    return store


def test_a_database_that_is_named_is_used_and_the_store_is_not_asked(store: MemoryObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFREEZE_LEDGER_URL", "postgres://team:hunter2@db.example:5433/ml?sslpassword=hunter3")
    choice = choose(STORAGE)
    assert (choice.where, choice.why) == ("postgresql://team@db.example:5433/ml", "UNFREEZE_LEDGER_URL names it")
    assert "hunter2" not in repr(choice)
    assert isinstance(open_ledger(STORAGE), SqlLedger)
    assert store.writes == 0


def test_s3_is_used_where_it_enforces_conditional_writes() -> None:
    choice = choose(STORAGE)
    assert choice.where == "s3://unfreeze/team/ledger"
    assert "enforces conditional writes (probed)" in choice.why
    assert isinstance(open_ledger(STORAGE), S3Ledger)


def test_a_file_in_the_home_is_used_where_it_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(_IgnoresConditions(), monkeypatch, tmp_path)
    choice = choose(STORAGE)
    assert choice.where == f"sqlite:///{tmp_path / 'ledger.db'}"
    assert "does not enforce conditional writes (probed)" in choice.why
    assert "UNFREEZE_LEDGER_URL" in choice.why
    entry = open_ledger(STORAGE).append(MODEL, content(), 1)
    assert open_ledger(STORAGE).entries(MODEL) == [entry]


def test_the_store_is_asked_once_a_process(store: MemoryObjectStore) -> None:
    for _ in range(3):
        choose(STORAGE)
    assert store.writes == 1


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql://u:p%40ss@h:5/d", "postgresql+psycopg://u:p%40ss@h:5/d"),
        ("postgresql+asyncpg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("sqlite:////var/ledger.db", "sqlite:////var/ledger.db"),
    ],
)
def test_an_address_is_understood_as_other_tools_write_it(text: str, meant: str) -> None:
    assert database_url(text).render_as_string(hide_password=False) == meant


@pytest.mark.parametrize(
    "text",
    [
        "hunter2",
        "postgresql://u:hunter2@h:port/d",
        "mysql://u:hunter2@h/d",
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://u:hunter@2@h/d",
    ],
)
def test_what_is_no_address_of_a_ledger_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(UserError, match="UNFREEZE_LEDGER_URL") as caught:
        database_url(text)
    assert "hunter" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["postgresql://u:hunter2@127.0.0.1:9/d", "sqlite:////nowhere/at/all/ledger.db"])
def test_a_database_that_cannot_be_reached_is_a_service_that_failed_and_says_what_to_do(text: str, store: MemoryObjectStore) -> None:
    url = database_url(text)
    with pytest.raises(ServiceError, match="Check UNFREEZE_LEDGER_URL") as caught:
        SqlLedger(url, store, STORAGE).append(MODEL, content(), 1)
    assert caught.value.exit_code == 3
    assert shown(url) in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert store.writes == 0
