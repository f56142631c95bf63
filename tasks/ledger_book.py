"""The ledger of one model as a step reads it: which entries there are, who serves by them, and MLflow's alias, which follows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from infra import progress, registry
from infra.errors import LedgerConflict, UserError
from infra.ledger import Content, Entry, Ledger, champion_of
from infra.ledger_choice import open_ledger
from infra.object_store import object_store
from tasks.lineage import read_lineage

PLACE = "unfreeze.ledger"
"""Tag of the registered model: the storage below which its ledger lies. It stays there, wherever later specs publish."""
ARTIFACT = "unfreeze.artifact_uri"


@dataclass(frozen=True)
class Book:
    """The ledger of one model, and its entries when they were read."""

    model: str
    storage: str
    ledger: Ledger
    entries: list[Entry]
    before: str | None = None
    """The champion from before there was a ledger, where this one is empty."""

    @property
    def champion(self) -> str | None:
        """The version that serves."""
        return champion_of(self.entries) if self.entries else self.before

    def settled(self, request: str) -> Entry | None:
        """The entry that answered this request, if one has."""
        return next((entry for entry in self.entries if entry.digests.get("request") == request), None)

    def read_again(self) -> Book:
        return _read(self.model, self.storage, self.ledger)


def open_book(model: str, default_storage: str | None = None) -> Book:
    """The ledger of a registered model. Raises UserError where there is no such model and no storage is given for its first entry."""
    storage = find_storage(model, default_storage)
    return _read(model, storage, open_ledger(storage))


def find_storage(model: str, default_storage: str | None = None) -> str:
    """The storage below which the ledger of a model lies."""
    storage = _place(model) or default_storage
    if storage is None:
        known = ", ".join(registry.names()) or "none"
        raise UserError(f"There is no model {model!r} with a published version.", f"`unfreeze retrain` makes one; registered are: {known}.")
    return storage


def _read(model: str, storage: str, ledger: Ledger) -> Book:
    entries = ledger.entries(model)
    return Book(model, storage, ledger, entries, None if entries else _before_the_ledger(model))


def _place(model: str) -> str | None:
    tags = registry.model_tags(model)
    if tags is None:
        return None
    if PLACE in tags:
        return tags[PLACE]
    newest = registry.newest(model)
    uri = newest.tags.get(ARTIFACT, "") if newest else ""
    return uri.removesuffix(f"/models/{model}/{newest.version}") if newest and uri else None


def append(book: Book, content: Content) -> Entry | None:
    """Commit an entry that was decided against `content.from_version`; None where another serves by now, which must be judged anew."""
    registry.set_model_tag(book.model, PLACE, book.storage)
    while book.champion == content.from_version:
        try:
            return book.ledger.append(book.model, content, len(book.entries) + 1)
        except LedgerConflict:
            book = book.read_again()
    return None


def follow(book: Book) -> tuple[str | None, list[str]]:
    """Let MLflow's alias name whoever serves by the ledger; that version, and words on what was not so.

    The ledger is read again after the alias was set: of two commands that set it at once, the later one to look puts it right.
    """
    notes: list[str] = []
    while book.entries:
        champion = book.champion
        named = registry.champion(book.model)
        if (named.version if named else None) != champion:
            notes.append(_words(book, named.version if named else None, champion))
            _set(book.model, champion)
        book = book.read_again()
        if book.champion == champion:
            return champion, notes
    named = registry.champion(book.model)
    if named is not None and book.before is None:
        by_hand = f"The alias champion of {book.model} names version {named.version}, which was never promoted: it was set by hand."
        notes.append(f"{by_hand} Nothing is judged against it.")
    return book.before, notes


def _before_the_ledger(model: str) -> str | None:
    """The version that the alias names, if it was published before there were ledgers. Any other alias was set by hand."""
    named = registry.champion(model)
    uri = named.tags.get(ARTIFACT) if named else None
    return named.version if named and uri and read_lineage(object_store(), uri) is None else None


def _set(model: str, champion: str | None) -> None:
    if champion is None:
        registry.delete_alias(model, registry.CHAMPION)
    elif registry.get(model, champion) is None:
        raise UserError(
            f"Version {champion} of {model} serves by the ledger, but it was deleted from MLflow.",
            f"Put another one back: `unfreeze rollback {model} --to VERSION --reason TEXT`; `unfreeze history {model}` lists them.",
        )
    else:
        registry.set_alias(model, registry.CHAMPION, champion)


def _words(book: Book, named: str | None, champion: str | None) -> str:
    """A crash between entry and alias leaves the alias on the version before; anything else was done by hand."""
    was = f"named version {named}" if named else "was missing"
    now = f"It names version {champion} again" if champion else "It is removed"
    last = book.entries[-1]
    if named == champion_of(book.entries[:-1]) and last.to_version == champion:
        why = f"a command was cut off after entry {last.number} of the ledger, or it was moved by hand"
        return f"The alias champion of {book.model} {was}: {why}. {now}."
    return (
        f"The alias champion of {book.model} {was}, which the ledger does not know of: moved by hand, or another model registry. "
        f"{now}; `unfreeze rollback {book.model} --to VERSION --reason TEXT` is the way to change it."
    )


def tell(notes: list[str]) -> None:
    """Say what was not as the ledger says."""
    for note in notes:
        progress.say(f"[yellow]note:[/] {note}")


def now() -> str:
    """This moment, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain_entry(entry: Entry) -> dict[str, Any]:
    """An entry as `history --json` prints it."""
    content: dict[str, Any] = entry.model_dump(by_alias=True)
    return content
