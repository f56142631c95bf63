"""The journal of a running search: read back whole, whatever a dying store or writer left of it."""

from __future__ import annotations

import time
from typing import Any

from ray_jobs.search_journal import Journal
from tests.fakes import MemoryObjectStore

URI = "s3://bucket/searches/a.journal"


def _journal(store: MemoryObjectStore) -> tuple[Journal, list[dict[str, Any]]]:
    journal = Journal(store, URI)
    events = journal.load()
    journal.start()
    return journal, events


def _write(store: MemoryObjectStore, *kinds: str) -> None:
    """Each in a segment of its own, as by drivers that died after one event."""
    for kind in kinds:
        journal, _ = _journal(store)
        journal.append({"kind": kind})
        journal.close()


def _kinds(store: MemoryObjectStore) -> list[str]:
    return [event["kind"] for event in Journal(store, URI).load()]


def test_drivers_that_follow_each_other_read_all_that_went_before() -> None:
    store = MemoryObjectStore()
    _write(store, "a", "b", "c")
    assert _kinds(store) == ["a", "b", "c"]


def test_a_segment_that_was_cut_off_counts_up_to_there() -> None:
    store = MemoryObjectStore()
    journal, _ = _journal(store)
    for kind in ("a", "b", "c"):
        journal.append({"kind": kind})
    journal.close()
    uri = _segments(store)[-1]
    store.write(uri, store.read(uri)[:-5])
    assert _kinds(store) == ["a", "b"]
    _write(store, "d")
    assert _kinds(store) == ["a", "b", "d"]


def test_after_a_gap_only_what_was_written_anew_counts() -> None:
    store = MemoryObjectStore()
    _write(store, "a", "b", "c")
    store.write(_segments(store)[1], b'{"kind": ')
    assert _kinds(store) == ["a"]
    _write(store, "B", "C")
    assert _kinds(store) == ["a", "B", "C"]


class _LosesAnAnswer(MemoryObjectStore):
    """Its second write arrives but seems to fail."""

    def write(self, uri: str, data: bytes) -> None:
        super().write(uri, data)
        if self.writes == 2:
            raise OSError("the answer was lost")


def test_events_written_twice_count_once() -> None:
    store = _LosesAnAnswer()
    journal, _ = _journal(store)
    written = 0
    while store.writes < 3:
        journal.append({"kind": str(written)})
        written += 1
        time.sleep(0.001)
    journal.close()
    assert _kinds(store) == [str(number) for number in range(written)]


def _segments(store: MemoryObjectStore) -> list[str]:
    return sorted(info.uri for info in store.list(URI))
