"""A folder on S3 that exists only once its MANIFEST.json does: write the objects, then commit with one small last write.

Crash order: objects first, MANIFEST.json last. A reader looks for the manifest; without it there is no folder, and the
next writer simply writes the objects again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from infra.errors import UserError
from infra.in_threads import in_threads
from infra.object_store import ObjectStore, join_uri

MANIFEST = "MANIFEST.json"
TRANSFER_THREADS = 8
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One object of a folder: its key relative to the folder, size in bytes and hex sha256."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The objects of a committed folder, by key."""

    objects: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.objects)

    def to_json(self) -> bytes:
        rows = [{"key": e.key, "size": e.size, "sha256": e.sha256} for e in self.objects]
        return json.dumps({"objects": rows}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError where it is no manifest, or names what is outside its folder: who fetches it writes files by its keys."""
        try:
            found = tuple(Entry(row["key"], row["size"], row["sha256"]) for row in json.loads(data)["objects"])
            wrong = next((entry for entry in found if not _is_inside(entry.key) or not DIGEST.fullmatch(entry.sha256)), None)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from None
        if wrong is not None:
            raise ValueError(f"no key of a folder with its digest: {wrong}")
        return cls(found)


@dataclass(frozen=True)
class Committed:
    """What a commit did: the manifest, and how many objects it had to send."""

    manifest: Manifest
    transferred: int


@dataclass(frozen=True)
class Problem:
    """One difference between a folder and its manifest; `what` is missing, altered or extra."""

    key: str
    what: str


def read_manifest(store: ObjectStore, uri: str) -> Manifest | None:
    """The manifest of the folder at `uri`, or None where it was never committed."""
    try:
        return Manifest.from_json(store.read(join_uri(uri, MANIFEST)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"The {MANIFEST} at {uri} is damaged: {error}", "Have the folder written again, or put its manifest back."
        ) from None


def commit(
    store: ObjectStore,
    uri: str,
    files: Mapping[str, Path | bytes],
    *,
    already_there: Manifest | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Committed:
    """Make the folder at `uri` hold exactly `files` (and `already_there`: objects that workers wrote before), then commit.

    What the folder's own manifest already lists with the same digest, and a listing shows with the same size, is not
    sent again; an unchanged folder costs no transfer. `on_progress` gets bytes done and total.
    """
    entries = {key: _entry(key, content) for key, content in files.items()}
    wanted = Manifest(tuple(sorted([*entries.values(), *(already_there.objects if already_there else ())], key=lambda e: e.key)))
    try:
        before = read_manifest(store, uri)
    except ValueError:  # damaged: the folder is written again
        before = Manifest(())
    listed = {info.uri: info.size_bytes for info in store.list(uri)} if before is not None else {}
    kept = {e for e in (before.objects if before else ()) if listed.get(join_uri(uri, e.key)) == e.size}
    to_send = [entry for entry in entries.values() if entry not in kept]
    if before == wanted and not to_send:
        return Committed(wanted, 0)
    if before is not None:  # changing a committed folder: it must not look finished while half new
        store.delete([join_uri(uri, MANIFEST)])
    done, total = 0, sum(entry.size for entry in to_send)
    for size in in_threads(lambda entry: _send(store, join_uri(uri, entry.key), files[entry.key]), to_send, TRANSFER_THREADS):
        done += size
        on_progress(done, total)
    keys = {join_uri(uri, entry.key) for entry in wanted.objects}
    others = {info.uri for info in store.list(uri)} - keys
    if join_uri(uri, MANIFEST) in others and _is_committed(store, uri, wanted):  # by another, meanwhile
        others.remove(join_uri(uri, MANIFEST))
    store.delete(sorted(others))
    store.write(join_uri(uri, MANIFEST), wanted.to_json())
    return Committed(wanted, len(to_send))


def _is_committed(store: ObjectStore, uri: str, wanted: Manifest) -> bool:
    try:
        return read_manifest(store, uri) == wanted
    except ValueError:
        return False


def verify(store: ObjectStore, uri: str) -> list[Problem]:
    """Every object that is missing, altered or extra. Raises UserError where nothing was committed at `uri`."""
    manifest = read_manifest(store, uri)
    if manifest is None:
        raise UserError(
            f"Nothing was published at {uri}: it has no {MANIFEST}.", "Check the address; `unfreeze retrain` prints it as publish.uri."
        )
    listed = {info.uri: info.size_bytes for info in store.list(uri)}
    found = list(in_threads(lambda entry: _check(store, uri, entry, listed), manifest.objects, TRANSFER_THREADS))
    known = {join_uri(uri, key) for key in [MANIFEST, *(entry.key for entry in manifest.objects)]}
    extra = [Problem(other[len(uri.rstrip("/")) + 1 :], "extra") for other in listed if other not in known]
    return [problem for problem in found if problem] + extra


def fetch(store: ObjectStore, uri: str, folder: Path) -> Path:
    """A local copy of the committed folder at `uri` below `folder`, complete and checked; made once a machine.

    Raises FileNotFoundError where it was never committed, UserError (a ValueError) where an object does not match its digest.
    """
    manifest = read_manifest(store, uri)
    if manifest is None:
        raise FileNotFoundError(join_uri(uri, MANIFEST))
    name = hashlib.sha256(uri.encode() + manifest.to_json()).hexdigest()[:32]
    target = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if target.exists():
            return target
        aside = folder / f"{name}.partial"  # what an earlier attempt left here is of the same manifest: it carries on
        aside.mkdir(exist_ok=True)
        for _ in in_threads(lambda entry: _receive(store, uri, entry, aside), manifest.objects, TRANSFER_THREADS):
            pass
        aside.rename(target)
    return target


def fetch_object(store: ObjectStore, uri: str, entry: Entry, folder: Path) -> Path:
    """A local copy of one object of the committed folder at `uri`, below `folder` under its digest; checked, made once a machine."""
    path = folder / f"{entry.sha256}{Path(entry.key).suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{path.name}.lock"):
        if not path.exists() or path.stat().st_size != entry.size:
            aside = f"{path.name}.partial"
            _receive(store, uri, entry, folder, aside)
            (folder / aside).rename(path)
    return path


def _is_inside(key: str) -> bool:
    """Whether a key stays in its folder, on S3 as on a disk."""
    return all(part not in ("", ".", "..") for part in key.split("/")) and not any(sign in key for sign in "\\\0")


def _entry(key: str, content: Path | bytes) -> Entry:
    if isinstance(content, bytes):
        return Entry(key, len(content), hashlib.sha256(content).hexdigest())
    with content.open("rb") as file:
        return Entry(key, content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _send(store: ObjectStore, uri: str, content: Path | bytes) -> int:
    if isinstance(content, bytes):
        store.write(uri, content)
        return len(content)
    store.upload(content, uri)
    return content.stat().st_size


def _check(store: ObjectStore, uri: str, entry: Entry, listed: Mapping[str, int]) -> Problem | None:
    object_uri = join_uri(uri, entry.key)
    if object_uri not in listed:
        return Problem(entry.key, "missing")
    if listed[object_uri] != entry.size or hashlib.sha256(store.read(object_uri)).hexdigest() != entry.sha256:
        return Problem(entry.key, "altered")
    return None


def _receive(store: ObjectStore, uri: str, entry: Entry, folder: Path, name: str = "") -> None:
    path = folder / (name or entry.key)
    if path.exists() and _entry(entry.key, path) == entry:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    store.download(join_uri(uri, entry.key), path)
    if _entry(entry.key, path) != entry:
        path.unlink()
        what = f"{join_uri(uri, entry.key)} does not match its {MANIFEST}: it was altered since it was written, or only half arrived."
        raise UserError(what, f"`unfreeze verify {uri}` says what else differs.")
