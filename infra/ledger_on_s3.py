"""The ledger as objects `ledger/NAME/000001.json`: on a store that enforces conditional writes, the one write of an object is the commit.

Crash order: nothing but that write happens, so an entry is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from infra.in_threads import in_threads
from infra.ledger import Content, Entry, Kept, conflict, encode, next_entry, trusted
from infra.object_store import ObjectStore, join_uri

READ_THREADS = 8


def entry_uri(storage: str, model: str, number: int) -> str:
    """Where the entry of this number lies."""
    return join_uri(storage, "ledger", model, f"{number:06}.json")


def numbers_on_s3(store: ObjectStore, storage: str, model: str) -> set[int]:
    """The numbers that have an object, by listing alone."""
    found = set()
    for info in store.list(join_uri(storage, "ledger", model)):
        name = info.uri.rpartition("/")[2].removesuffix(".json")
        if name.isdecimal() and info.uri == entry_uri(storage, model, int(name)):
            found.add(int(name))
    return found


def read_from_s3(store: ObjectStore, storage: str, model: str, known: Mapping[int, bytes] | None = None) -> dict[int, bytes]:
    """Every object of the chain, by number; what is `known` is not read again."""
    numbers, before = sorted(numbers_on_s3(store, storage, model)), known or {}
    unknown = [number for number in numbers if number not in before]
    contents = in_threads(lambda number: store.read(entry_uri(storage, model, number)), unknown, READ_THREADS)
    read = dict(zip(unknown, contents, strict=True))
    return {number: read.get(number) or before[number] for number in numbers}


class S3Ledger:
    """Use it only where `enforces_write_if_absent` says so. An entry never changes, so each is read once; `kept` reads all anew."""

    def __init__(self, store: ObjectStore, storage: str) -> None:
        self.store = store
        self.storage = storage
        self._known: dict[str, dict[int, bytes]] = {}

    def entries(self, model: str) -> list[Entry]:
        found = read_from_s3(self.store, self.storage, model, self._known.get(model))
        entries = trusted(model, found)
        self._known[model] = found
        return entries

    def append(self, model: str, content: Content, expected_number: int) -> Entry:
        before = None
        with suppress(FileNotFoundError):
            before = self.store.read(entry_uri(self.storage, model, expected_number - 1))
        entry = next_entry(model, content, expected_number, before)
        uri, data = entry_uri(self.storage, model, expected_number), encode(entry)
        # where the answer to a write was lost for good, whoever tries again is refused by the first write: the same bytes are ours
        if not self.store.write_if_absent(uri, data) and (there := self.store.read(uri)) != data:
            raise conflict(model, expected_number, there)
        return entry

    def kept(self, model: str) -> Kept:
        return Kept(read_from_s3(self.store, self.storage, model))
