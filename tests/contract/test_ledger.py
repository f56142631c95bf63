"""The laws of the ledger seam, wherever it is kept: S3, SQLite, PostgreSQL, and the object store in memory (races: tests/integration)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import LedgerConflict, LedgerDamaged, ServiceError
from infra.ledger import encode, read_entry, verify
from infra.ledger_in_sql import SqlLedger, database_url
from tests.fakes import MemoryObjectStore
from tests.ledger_worlds import MODEL, World, content, make_world

SQL = ("sqlite", "postgresql")


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return make_world(request.param, request, tmp_path)


everywhere = pytest.mark.parametrize("world", ["memory", "s3", *SQL], indirect=True)
in_sql = pytest.mark.parametrize("world", SQL, indirect=True)


def write(world: World, count: int, model: str = MODEL) -> dict[int, bytes]:
    """A ledger of `count` entries; their bytes."""
    ledger = world.open()
    return {number: encode(ledger.append(model, content(str(number)), number)) for number in range(1, count + 1)}


def found_in(world: World) -> list[int]:
    kept = world.open().kept(MODEL)
    return [finding.number for finding in verify(kept.entries, kept.copies)]


@everywhere
def test_a_model_that_was_never_promoted_has_no_entries(world: World) -> None:
    assert world.open().entries("nobody") == []
    assert world.open().kept("nobody").entries == {}


@everywhere
def test_what_was_appended_is_read_by_another_process_in_order_and_verifies(world: World) -> None:
    written = write(world, 3)
    assert [encode(entry) for entry in world.open().entries(MODEL)] == list(written.values())
    assert world.open().kept(MODEL).entries == written
    assert found_in(world) == []


@everywhere
def test_every_entry_lies_on_s3_as_its_canonical_bytes(world: World) -> None:
    for number, data in write(world, 2).items():
        assert world.uri(number).endswith(f"/ledger/emoji/00000{number}.json")
        assert world.store.read(world.uri(number)) == data


@everywhere
def test_who_comes_second_is_told_who_was_first_and_changes_nothing(world: World) -> None:
    written = write(world, 2)
    for number in (1, 2):
        with pytest.raises(LedgerConflict, match=rf"entry {number} .* \(ada, version {number}: promoted\)"):
            world.open().append(MODEL, content("9", by="bob"), number)
    assert world.open().kept(MODEL).entries == written


@everywhere
def test_an_append_whose_answer_was_lost_may_be_repeated(world: World) -> None:
    first = world.open().append(MODEL, content(), 1)
    assert world.open().append(MODEL, content(), 1) == first
    assert world.open().entries(MODEL) == [first]


@everywhere
def test_no_gap_can_be_made(world: World) -> None:
    write(world, 1)
    with pytest.raises(LedgerDamaged, match="entry 2: missing"):
        world.open().append(MODEL, content(), 3)
    assert len(world.open().entries(MODEL)) == 1


@everywhere
def test_each_model_has_a_chain_of_its_own(world: World) -> None:
    write(world, 2, "emoji")
    write(world, 1, "emoji-2")
    assert [len(world.open().entries(model)) for model in ("emoji", "emoji-2", "emo")] == [2, 1, 0]


@everywhere
def test_whatever_a_person_writes_comes_back(world: World) -> None:
    said = content(reason='"quoted"\n\0\t\\ ünï 🦜 \u2028', by="ada@host", approver="bob", **{"from": "7"})
    world.open().append(MODEL, said, 1)
    (entry,) = world.open().entries(MODEL)
    assert (entry.reason, entry.approver, entry.from_version, entry.digests) == (said.reason, "bob", "7", said.digests)


@everywhere
def test_of_many_threads_one_gets_each_number(world: World) -> None:
    ledger, start = world.open(), threading.Barrier(6)

    def try_it(number: int) -> str | None:
        start.wait()
        try:
            return ledger.append(MODEL, content(str(number)), 1).to_version
        except LedgerConflict:
            return None

    with ThreadPoolExecutor(6) as pool:
        winners = [winner for winner in pool.map(try_it, range(6)) if winner is not None]
    assert winners == [entry.to_version for entry in ledger.entries(MODEL)]
    assert len(winners) == 1


@everywhere
def test_a_missing_or_swapped_entry_is_found_and_nothing_is_decided_by_that_ledger(world: World) -> None:
    written = write(world, 4)
    world.remove(2)
    assert 2 in found_in(world)
    with pytest.raises(LedgerDamaged, match=r"entry 2: .*missing"):
        world.open().entries(MODEL)
    world.put(2, written[3])
    world.put(3, written[2])
    assert set(found_in(world)) == {2, 3}
    with pytest.raises(LedgerDamaged, match="entry 2: reordered"):
        world.open().entries(MODEL)


@everywhere
def test_nothing_is_appended_to_an_altered_entry(world: World) -> None:
    written = write(world, 2)
    world.put(2, written[2].replace(b"ada", b"eve"))
    with pytest.raises(LedgerDamaged, match="entry 2: altered"):
        world.open().append(MODEL, content(), 3)


@everywhere
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_altered_byte_is_found_wherever_the_entry_is_kept(world: World, data: st.DataObject) -> None:
    written = world.open().kept(MODEL).entries or write(world, 3)
    number = data.draw(st.sampled_from(sorted(written)))
    place = data.draw(st.integers(0, len(written[number]) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != written[number][place]))
    altered = written[number][:place] + bytes([other]) + written[number][place + 1 :]
    world.put(number, altered)
    assert number in found_in(world)
    world.put(number, written[number])
    if world.database:
        world.store.write(world.uri(number), altered)
        assert found_in(world) == [number]
        world.store.write(world.uri(number), written[number])
    assert found_in(world) == []


@in_sql
@pytest.mark.parametrize("use", ["read", "append", "verify"])
def test_a_crash_between_the_row_and_its_copy_is_made_good_by_the_next_use(world: World, use: str) -> None:
    written = write(world, 3)
    world.store.delete([world.uri(2), world.uri(3)])
    ledger = world.open()
    uses: dict[str, Any] = {"read": ledger.entries, "append": lambda model: ledger.append(model, content(), 4), "verify": ledger.kept}
    uses[use](MODEL)
    assert [world.store.read(world.uri(number)) for number in (2, 3)] == [written[2], written[3]]
    assert found_in(world) == []


@in_sql
def test_an_entry_whose_copy_fails_is_committed_all_the_same(world: World, caplog: pytest.LogCaptureFixture) -> None:
    class _RefusesWrites(MemoryObjectStore):
        def write_if_absent(self, uri: str, data: bytes) -> bool:
            raise ServiceError(f"no room for {uri}")

    assert world.database
    ledger = SqlLedger(database_url(world.database), _RefusesWrites(), world.storage)
    assert ledger.append(MODEL, content(), 1) == ledger.entries(MODEL)[0]
    assert "no room" in caplog.text
    assert [finding.what for finding in verify(*vars(ledger.kept(MODEL)).values())] == ["its copy on S3 is missing"]


@in_sql
def test_a_copy_that_differs_is_left_for_verify_to_tell(world: World) -> None:
    written = write(world, 2)
    world.store.write(world.uri(1), b"{}")
    world.open().entries(MODEL)
    world.open().append(MODEL, content(), 3)
    assert world.store.read(world.uri(1)) == b"{}"
    assert found_in(world) == [1]
    assert world.open().kept(MODEL).entries[1] == written[1]


@in_sql
def test_a_new_database_takes_over_the_chain_that_lies_on_s3(world: World, tmp_path: Path) -> None:
    written = write(world, 3)
    successor = World("sqlite", world.storage, f"sqlite:///{tmp_path / 'new.db'}")
    with pytest.raises(LedgerConflict):
        successor.open().append(MODEL, content("9"), 1)
    assert read_entry(encode(successor.open().append(MODEL, content("4"), 4)), 4).previous_digest in written[3].decode()
    assert found_in(successor) == []


@in_sql
def test_a_new_database_takes_over_no_damaged_chain(world: World, tmp_path: Path) -> None:
    write(world, 3)
    world.store.delete([world.uri(1)])
    with pytest.raises(LedgerDamaged, match="entry 1: missing"):
        World("sqlite", world.storage, f"sqlite:///{tmp_path / 'new.db'}").open().entries(MODEL)


@in_sql
def test_a_database_that_is_behind_its_copies_writes_nothing(world: World) -> None:
    write(world, 3)
    world.remove(3)
    for use in (world.open().entries, lambda model: world.open().append(model, content("9"), 3)):
        with pytest.raises(LedgerDamaged, match="entry 3: there is a copy on S3"):
            use(MODEL)
    assert found_in(world) == [3]


@in_sql
def test_processes_that_meet_a_fresh_database_make_its_table_once(world: World) -> None:
    start = threading.Barrier(8)

    def first_use(number: int) -> list[Any]:
        ledger = world.open()
        start.wait()
        return ledger.entries(f"model-{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_use, range(8))) == [[]] * 8


@pytest.mark.parametrize("world", ["postgresql"], indirect=True)
def test_an_append_survives_the_loss_of_its_connection(world: World) -> None:
    import sqlalchemy as sa

    ledger = world.open()
    assert isinstance(ledger, SqlLedger)
    lost = []

    @sa.event.listens_for(ledger._engine, "before_cursor_execute")
    def lose_it(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT") and not lost:
            lost.append(cursor.connection.info.backend_pid)
            with world._connected() as other:
                other.execute(sa.text(f"SELECT pg_terminate_backend({lost[0]}, 5000)"))

    entry = ledger.append(MODEL, content(), 1)
    assert lost
    assert world.open().entries(MODEL) == [entry]


def test_a_refused_password_is_not_repeated(postgresql_server: str) -> None:
    url = database_url(f"{postgresql_server}/postgres").set(password="hunter2")
    with pytest.raises(ServiceError, match="authentication failed") as caught:
        SqlLedger(url, MemoryObjectStore(), "s3://unfreeze/a").entries(MODEL)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
