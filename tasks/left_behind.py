"""Which folders on S3 were begun and not committed, by a listing alone: pure functions, and the store's own clock."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from infra.committed_folder import MANIFEST
from infra.object_store import ObjectInfo, ObjectStore, join_uri

DAY_S = 86400.0
FOLDERS = {
    "datasets": r"datasets/[^/]+/[^/]+",
    "features": r"features/[^/]+",
    "backbones": r"backbones/[^/]+",
    "searches": r"searches/[^/]+",
    "fits": r"fits/[^/]+/(?:checkpoints/[^/]+|fit|probe)",
    "models": r"models/[^/]+/[^/]+",
    "onnx": r"onnx/[^/]+",
    "evaluations": r"evaluations/[^/]+",
    "evidence": r"evidence/[^/]+/[^/]+",
    "jobs": r"jobs/[^/]+",
}
"""The folders that a manifest commits, by the first part of their keys below the storage; and those of Ray jobs, which none commits."""


@dataclass(frozen=True)
class Folder:
    """What lies in one folder: how many bytes, when last written (seconds since 1970, by the store's clock), whether it was committed."""

    uri: str
    size_bytes: int
    newest: float
    is_committed: bool


def folders(kind: str, storage: str, infos: Iterable[ObjectInfo]) -> list[Folder]:
    """The folders of a kind that these objects make up."""
    pattern, start = re.compile(FOLDERS[kind] + "(?=/)"), len(join_uri(storage)) + 1
    found: dict[str, Folder] = {}
    for info in infos:
        if match := pattern.match(info.uri, start):
            uri, is_manifest = info.uri[: match.end()], info.uri[match.end() :] == f"/{MANIFEST}"
            known = found.get(uri, Folder(uri, 0, 0.0, False))
            size_bytes, newest = known.size_bytes + info.size_bytes, max(known.newest, info.modified_at)
            found[uri] = Folder(uri, size_bytes, newest, known.is_committed or is_manifest)
    return list(found.values())


def abandoned(found: Iterable[Folder], now: float) -> list[Folder]:
    """Those that nobody committed, or wrote to for a day."""
    return [folder for folder in found if not folder.is_committed and now - folder.newest > DAY_S]


def clock_of(store: ObjectStore, storage: str) -> float:
    """What time it is where objects get their time stamps: this machine's clock may be another."""
    uri = join_uri(storage, "probes", "clock")
    store.write(uri, b"What time is it?\n")
    return max(info.modified_at for info in store.list(join_uri(storage, "probes")) if info.uri == uri)
