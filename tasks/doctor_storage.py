"""What killed processes left on S3: folders without a manifest, unfinished uploads, objects of jobs; found, and thrown away.

Left behind is what nobody wrote to for a day, by the store's own clock, while no flow run is at work and nobody renews a lease. What
the same command carries on, an unfinished search, is told and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from rich.filesize import decimal

from infra import job_server
from infra.committed_folder import MANIFEST
from infra.errors import UnfreezeError
from infra.job_server import JobServer
from infra.object_store import S3ObjectStore, join_uri, object_store
from tasks.doctor_work import at_work
from tasks.finding import Finding
from tasks.left_behind import DAY_S, FOLDERS, Folder, abandoned, clock_of, folders

RENEWED_S = 600.0
"""A lease is renewed every few seconds; one that is younger than this may be somebody's."""


@dataclass(frozen=True)
class Place:
    """A storage at a moment of its own clock, and why nothing there may be thrown away; None where it may."""

    store: S3ObjectStore
    storage: str
    now: float
    in_use: str | None


def left_behind(storage: str) -> Iterator[Finding]:
    """Everything; what stands in the way of throwing it away is told with it."""
    place = look_at(storage)
    for kind in FOLDERS:
        for folder in abandoned(folders(kind, storage, place.store.list(join_uri(storage, kind))), place.now):
            if finding := _found(place, kind, folder):
                yield finding
    uploads = [uri for kind in FOLDERS for uri in place.store.stale_uploads(join_uri(storage, kind) + "/")]
    if uploads:
        words = f"{len(uploads)} uploads were begun and not carried on for a day, the first of {uploads[0]}: their parts cost space"
        yield _held(place, Finding("uploads", "wrong", words, "They are ended.", partial(_end_uploads, storage)))


def look_at(storage: str) -> Place:
    """The storage as it is at this moment."""
    store = object_store()
    now = clock_of(store, storage)
    return Place(store, storage, now, _in_use(store, storage, now))


def _in_use(store: S3ObjectStore, storage: str, now: float) -> str | None:
    names = at_work()
    if names is None:
        return "Prefect cannot be asked who is at work"
    if names:
        return f"{', '.join(names)} may be using it"
    if any(now - info.modified_at < RENEWED_S for info in store.list(join_uri(storage, "leases"))):
        return "somebody holds a lease"
    return None


def _found(place: Place, kind: str, folder: Folder) -> Finding | None:
    age = f"last written {(place.now - folder.newest) / DAY_S:.1f} days ago, {decimal(folder.size_bytes)}"
    if kind == "searches":
        return Finding(kind, "note", f"{folder.uri}: a search that was not finished, {age}", "The same command carries it on.")
    if kind == "jobs" and _may_run(folder.uri.rpartition("/")[2]):
        return None
    what = "of a Ray job whose outcome nobody took" if kind == "jobs" else f"without {MANIFEST}, so no reader sees it"
    fix = "It is deleted; whoever needs it makes it anew."
    return _held(place, Finding(kind, "wrong", f"{folder.uri}: {what}, {age}", fix, partial(_delete, place.storage, folder)))


def _held(place: Place, finding: Finding) -> Finding:
    """The finding, without its mend while somebody is at work."""
    if place.in_use is None:
        return finding
    return replace(finding, state="note", fix=f"Not now: {place.in_use}.", mend=None)


def _delete(storage: str, folder: Folder) -> str:
    place = look_at(storage)
    if place.in_use:
        return f"left alone: {place.in_use}"
    infos = list(place.store.list(folder.uri))
    if any(info.uri == join_uri(folder.uri, MANIFEST) or info.modified_at > folder.newest for info in infos):
        return "left alone: somebody has written there since"
    place.store.delete(info.uri for info in infos)
    return f"deleted: {len(infos)} objects, {decimal(folder.size_bytes)}"


def _end_uploads(storage: str) -> str:
    place = look_at(storage)
    if place.in_use:
        return f"left alone: {place.in_use}"
    return f"{sum(place.store.abort_stale_uploads(join_uri(storage, kind) + '/') for kind in FOLDERS)} ended"


def _may_run(job_id: str) -> bool:
    """Whether the job server says that the job waits or runs, or cannot be asked; where none is named, there is nobody to ask."""
    with suppress(UnfreezeError):
        address = job_server.named()
        job = JobServer(address).find(job_id) if address else None
        return job is not None and not job.is_over
    return True
