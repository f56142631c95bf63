"""What the dataset before already knows of its images, so that a night's preparation decodes only those that are new."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import pyarrow.parquet as pq

from infra.committed_folder import MANIFEST, read_manifest
from infra.object_store import ObjectStore, join_uri
from ray_jobs.dataset import FINGERPRINTS
from ray_jobs.sources import PREPARATION_VERSION, StoreFactory

COLUMNS = ("sha256", "width", "height", "mode", "format", "size_bytes")


@dataclass(frozen=True, slots=True)
class Facts:
    """What decoding one image told: digest of its bytes, size in pixels when upright, how its file stores it, and what it looks like."""

    sha256: str
    width: int
    height: int
    mode: str
    format: str
    size_bytes: int
    fingerprint: bytes


def former_dataset(store: ObjectStore, storage: str, name: str) -> str | None:
    """The URI of the dataset of this name that was committed last."""
    committed = [info for info in store.list(join_uri(storage, "datasets", name)) if info.uri.endswith(f"/{MANIFEST}")]
    last = max(committed, key=lambda info: info.modified_at, default=None)
    return last.uri.removesuffix(f"/{MANIFEST}") if last else None


@lru_cache(maxsize=1)
def known_images(uri: str | None, make_store: StoreFactory) -> Mapping[str, Facts]:
    """The images of a dataset by sha256; none where other code prepared it, or it is not what its manifest says."""
    store = make_store()
    try:
        if uri is None or json.loads(_checked(store, uri, "stats.json")).get("preparation") != PREPARATION_VERSION:
            return {}
        with pq.ParquetFile(io.BytesIO(_checked(store, uri, "manifest.parquet"))) as file:
            table = file.read(columns=list(COLUMNS))
        with pq.ParquetFile(io.BytesIO(_checked(store, uri, FINGERPRINTS))) as file:
            looks = file.read().column("fingerprint").to_pylist()
    except (FileNotFoundError, ValueError):
        return {}
    facts = map(Facts, *(table.column(name).to_pylist() for name in COLUMNS), looks)
    return {fact.sha256: fact for fact in facts}


def _checked(store: ObjectStore, uri: str, key: str) -> bytes:
    """Raises ValueError unless the object is what the manifest says."""
    manifest = read_manifest(store, uri)
    digests = {entry.key: entry.sha256 for entry in manifest.objects} if manifest else {}
    data = store.read(join_uri(uri, key))
    if hashlib.sha256(data).hexdigest() != digests.get(key):
        raise ValueError(f"{join_uri(uri, key)} does not match its {MANIFEST}")
    return data
