"""What the feature cache holds, on S3 and on this machine, and what of it to throw away. The policy is `chosen`, a pure function."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from infra.committed_folder import MANIFEST
from infra.errors import UserError
from infra.object_store import ObjectStore, join_uri, object_store
from infra.settings import cache_bytes, cache_dir
from ray_jobs import feature_cache
from ray_jobs.feature_batches import CONFIG, DamagedError, drop, open_selection
from ray_jobs.feature_cache import LocalCopy
from tasks.left_behind import DAY_S, abandoned, folders


@dataclass(frozen=True)
class Kept:
    """One set of features on S3: one cut and view of one backbone, in one or more batches."""

    set: str
    backbone: str | None
    unfreeze_depth: int | None
    view: str
    image_size: int
    dtype: str
    images: int
    batches: int
    bytes: int
    used_at: float
    uris: tuple[str, ...]


def show(storage: str) -> dict[str, Any]:
    """Both tiers, the most recently used first; what `cache --json` prints."""
    kept, copies = stored(object_store(), storage), feature_cache.local_copies(cache_dir())
    sets = [{key: value for key, value in asdict(one).items() if key != "uris"} for one in reversed(kept)]
    local = [{"folder": str(copy.path), "bytes": copy.size_bytes, "used_at": copy.used_at} for copy in reversed(copies)]
    return {
        "storage": storage, "sets": sets, "bytes": sum(one.bytes for one in kept), "local": local,
        "local_bytes": sum(copy.size_bytes for copy in copies), "local_budget_bytes": cache_bytes(),
    }  # fmt: skip


def prune(storage: str | None, *, older_than_days: float | None, to_bytes: int | None, dry_run: bool) -> dict[str, Any]:
    """Throw away what is older than so many days, then the least recently used until `to_bytes` are left; what went.

    On S3 below `storage`, or where that is None on this machine. Raises UserError where neither limit is given.
    """
    if older_than_days is None and to_bytes is None:
        raise UserError("`cache prune` was not told what to throw away.", "Give --older-than DAYS, --to-bytes SIZE, or both.")
    limits: dict[str, Any] = {"older_than_s": None if older_than_days is None else older_than_days * DAY_S, "to_bytes": to_bytes}
    if storage is None:
        copies = feature_cache.local_copies(cache_dir())
        gone = [copies[i] for i in chosen([(c.used_at, c.size_bytes) for c in copies], now=time.time(), **limits)]
        if not dry_run:
            gone = [copy for copy in gone if feature_cache.remove(copy)]
        return _answer("local", dry_run, [str(copy.path) for copy in gone], sum(copy.size_bytes for copy in gone), _left(copies, gone))
    store = object_store()
    kept = stored(store, storage)
    features = folders("features", storage, store.list(join_uri(storage, "features")))
    left_behind = [folder.uri for folder in abandoned(features, time.time())]
    dropped = [kept[i] for i in chosen([(one.used_at, one.bytes) for one in kept], now=time.time(), **limits)]
    uris = [uri for one in dropped for uri in one.uris]
    if not dry_run:
        for uri in [*_selections_of(store, storage, set(uris)), *uris, *left_behind]:  # a selection must not outlive its batches
            drop(store, uri)
        store.delete([join_uri(storage, "uses", "features", one.set) for one in dropped])
    freed = sum(one.bytes for one in dropped)
    return _answer("s3", dry_run, [one.set for one in dropped], freed, sum(one.bytes for one in kept) - freed)


def chosen(facts: Sequence[tuple[float, int]], *, now: float, older_than_s: float | None, to_bytes: int | None) -> list[int]:
    """Which of some things to throw away, given when each was last used (seconds) and its bytes, the least recently used first."""
    gone, left = [], sum(size for _, size in facts)
    for number, (used_at, size) in enumerate(facts):
        old = older_than_s is not None and now - used_at > older_than_s
        if old or (to_bytes is not None and left > to_bytes):
            gone.append(number)
            left -= size
    return gone


def stored(store: ObjectStore, storage: str) -> list[Kept]:
    """Every set of features on S3, the least recently used first. Folders that were never committed are not among them."""
    root = join_uri(storage, "features")
    folders: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for info in store.list(root):
        folder, _, key = info.uri[len(root) + 1 :].partition("/")
        folders[folder][key] = (info.size_bytes, info.modified_at)
    uses_root = join_uri(storage, "uses", "features")
    uses = {info.uri[len(uses_root) + 1 :]: info.modified_at for info in store.list(uses_root)}
    by_set: dict[str, list[str]] = defaultdict(list)
    for folder, objects in folders.items():
        digest, dash, _ = folder.partition("-")
        if dash and MANIFEST in objects:
            by_set[digest].append(folder)
    kept = []
    for digest, names in by_set.items():
        about = _about(store, [join_uri(root, name) for name in names])
        inside = [one for name in names for one in folders[name].values()]
        used_at = uses.get(digest) or max(modified for _, modified in inside)
        kept.append(_kept(digest, about, sum(size for size, _ in inside), used_at, tuple(join_uri(root, name) for name in names)))
    return sorted(kept, key=lambda one: (one.used_at, one.set))


def _about(store: ObjectStore, uris: Sequence[str]) -> list[dict[str, Any]]:
    """The config.json of each batch; a damaged one tells nothing."""
    configs = []
    for uri in uris:
        with suppress(FileNotFoundError, ValueError):
            configs.append(dict(json.loads(store.read(join_uri(uri, CONFIG)))))
    return configs


def _kept(digest: str, configs: Sequence[dict[str, Any]], size_bytes: int, used_at: float, uris: tuple[str, ...]) -> Kept:
    about: dict[str, Any] = configs[-1] if configs else {}
    what = about.get("set", {})
    backbone = about.get("backbone") if what.get("backbone_digest") else None
    images = sum(rows for config in configs for _, rows in config.get("shards", []))
    return Kept(
        digest, backbone, what.get("unfreeze_depth"), what.get("view", "?"), what.get("image_size", 0), what.get("dtype", "?"), images,
        len(uris), size_bytes, used_at, uris,
    )  # fmt: skip


def _selections_of(store: ObjectStore, storage: str, batches: set[str]) -> list[str]:
    """The selections that need one of these batches, and those that cannot be read any more."""
    found = []
    for uri in store.folders(join_uri(storage, "features") + "/"):
        if "-" not in uri.rpartition("/")[2]:
            try:
                needed = [batch for batch, _ in open_selection(store, uri).batches]
            except FileNotFoundError:  # another has just thrown it away
                continue
            except DamagedError:
                found.append(uri)
                continue
            if batches.intersection(needed):
                found.append(uri)
    return found


def _left(copies: Sequence[LocalCopy], gone: Sequence[LocalCopy]) -> int:
    return sum(copy.size_bytes for copy in copies) - sum(copy.size_bytes for copy in gone)


def _answer(tier: str, dry_run: bool, removed: list[str], freed_bytes: int, left_bytes: int) -> dict[str, Any]:
    return {"tier": tier, "dry_run": dry_run, "removed": removed, "freed_bytes": freed_bytes, "left_bytes": left_bytes}
