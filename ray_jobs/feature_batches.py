"""Features on S3: each pass over missing images commits one immutable batch; a selection says which rows make up one dataset.

    features/SET-BATCH/      shards, index.safetensors (the sha256 of each row's image), config.json, MANIFEST.json
    features/SELECTION/      rows.safetensors (batch and row of each row, labels), config.json, MANIFEST.json

Both are named by their content, so nothing committed ever changes. Crash order: shards first, each by whoever computed it; the
manifest last. What does not match its manifest is `DamagedError`: drop it (manifest first), and its images are computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from infra.committed_folder import MANIFEST, Entry, Manifest, commit
from infra.errors import ServiceError, UserError
from infra.in_threads import in_threads
from infra.object_store import ObjectStore, join_uri
from ray_jobs.feature_set import FeatureSet
from ray_jobs.spec import digest_of

SHARD_BYTES = 64 << 20
THREADS = 8
INDEX, ROWS, CONFIG = "index.safetensors", "rows.safetensors", "config.json"
Array = NDArray[Any]


class DamagedError(ServiceError):
    """A folder of features that does not match its manifest."""

    def __init__(self, uri: str, problem: str) -> None:
        super().__init__(f"The cached features at {uri} are damaged: {problem}.", "Run the same command again: they are computed anew.")
        self.uri, self.problem = uri, problem

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str, str]]:
        return DamagedError, (self.uri, self.problem)


@dataclass(frozen=True)
class Part:
    """One written shard: its entry in the manifest, and how many rows it holds."""

    entry: Entry
    rows: int


@dataclass(frozen=True)
class Batch:
    """A committed batch: its URI, its manifest's digest, and the 32-byte sha256 of each row's image."""

    uri: str
    manifest_digest: str
    images: list[bytes]


@dataclass(frozen=True)
class Selection:
    """The rows that make up a dataset's features at one cut: each row's batch and its row there; labels of train and val."""

    batches: list[tuple[str, str]]
    batch_of: NDArray[np.int32]
    row_of: NDArray[np.int64]
    labels: NDArray[np.int64]
    train: int
    views: int


def batch_uri(storage: str, features: FeatureSet, images: Iterable[str]) -> str:
    """Where the batch of these images (hex sha256) of a set lies."""
    return join_uri(storage, "features", f"{features.digest}-{digest_of(sorted(images))}")


def write_shards(store: ObjectStore, uri: str, number: int, values: Sequence[Array], dtype: str) -> list[Part]:
    """Write the rows of task `number`, cut where a shard would exceed 64 MB. Raises UserError where they do not fit `dtype`."""
    stored = [stored_as(value, dtype) for value in values]
    row_bytes = max(1, sum(value[:1].nbytes for value in stored))
    step, parts = max(1, SHARD_BYTES // row_bytes), []
    for start in range(0, len(stored[0]), step):
        rows = [np.ascontiguousarray(value[start : start + step]) for value in stored]
        data = safetensors.numpy.save({f"v{i}": value for i, value in enumerate(rows)})
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"{number:05d}-{start // step:03d}-{sha256[:12]}.safetensors"  # by content: two writers never spoil each other's shards
        store.write(join_uri(uri, key), data)
        parts.append(Part(Entry(key, len(data), sha256), len(rows[0])))
    return parts


def stored_as(value: Array, dtype: str) -> Array:
    """Float32 values in the storage type; bfloat16, which NumPy lacks, as its bits in uint16. Other values stay as they are."""
    if value.dtype != np.float32 or dtype == "float32":
        return value
    if dtype == "bfloat16":  # to the nearest, ties to even, as torch rounds
        bits = value.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):
        half: Array = value.astype(np.float16)
    if np.isinf(half).any() and np.isfinite(value).all():
        raise UserError(f"A feature of {np.abs(value).max():g} does not fit float16.", "Set search.feature_dtype to bfloat16 or float32.")
    return half


def commit_batch(store: ObjectStore, uri: str, images: Sequence[str], parts: Sequence[Part], about: Mapping[str, Any]) -> Batch:
    """Make written shards a batch that readers see; `images` are the sha256 of the rows, in the order of `parts`."""
    assert len(images) == sum(part.rows for part in parts), (len(images), parts)
    index = np.frombuffer(bytes.fromhex("".join(images)), dtype=np.uint8).reshape(-1, 32)
    config = {**about, "shards": [[part.entry.key, part.rows] for part in parts]}
    files: dict[str, Path | bytes] = {CONFIG: _json(config), INDEX: safetensors.numpy.save({"sha256": index})}
    manifest = commit(store, uri, files, already_there=Manifest(tuple(part.entry for part in parts))).manifest
    return Batch(uri, hashlib.sha256(manifest.to_json()).hexdigest(), _rows_of_bytes(index))


def find_batches(store: ObjectStore, storage: str, features: FeatureSet, on_damage: Callable[[DamagedError], None]) -> list[Batch]:
    """Every good batch of a set, by key; `on_damage` gets the others."""
    folders = store.folders(join_uri(storage, "features", f"{features.digest}-"))
    found = list(in_threads(lambda uri: _open_batch(store, uri), folders, THREADS))
    for one in found:
        if isinstance(one, DamagedError):
            on_damage(one)
    return [one for one in found if isinstance(one, Batch)]


def commit_selection(store: ObjectStore, storage: str, selection: Selection, about: Mapping[str, Any]) -> str:
    """Commit a selection; its URI, which is a digest of its content."""
    config = {**about, "kind": "selection", "train": selection.train, "views": selection.views, "batches": selection.batches}
    tensors: dict[str, Array] = {"batch": selection.batch_of, "row": selection.row_of, "labels": selection.labels}
    files: dict[str, Path | bytes] = {CONFIG: _json(config), ROWS: safetensors.numpy.save(tensors)}
    digest = digest_of({name: hashlib.sha256(data).hexdigest() for name, data in files.items() if isinstance(data, bytes)})
    uri = join_uri(storage, "features", digest)
    commit(store, uri, files)
    return uri


def open_selection(store: ObjectStore, uri: str) -> Selection:
    """Raises FileNotFoundError where it was never committed."""
    manifest, _ = read_checked_manifest(store, uri)
    config = json.loads(read_checked(store, uri, manifest, CONFIG))
    tensors = safetensors.numpy.load(read_checked(store, uri, manifest, ROWS))
    batches = [(str(key), str(digest)) for key, digest in config["batches"]]
    return Selection(batches, tensors["batch"], tensors["row"], tensors["labels"], config["train"], config["views"])


def read_checked_manifest(store: ObjectStore, uri: str) -> tuple[Manifest, str]:
    """A folder's manifest and its digest. Raises FileNotFoundError, or DamagedError where it is no manifest."""
    data = store.read(join_uri(uri, MANIFEST))
    try:
        return Manifest.from_json(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise DamagedError(uri, f"{MANIFEST} is not readable ({error})") from None


def read_checked(store: ObjectStore, uri: str, manifest: Manifest, key: str) -> bytes:
    """One object of a folder. Raises DamagedError unless it is what the manifest says."""
    entry = next((entry for entry in manifest.objects if entry.key == key), None)
    if entry is None:
        raise DamagedError(uri, f"{MANIFEST} does not list {key}")
    try:
        data = store.read(join_uri(uri, key))
    except FileNotFoundError:
        raise DamagedError(uri, f"{key} is missing") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedError(uri, f"{key} does not match its sha256")
    return data


def shards_of(store: ObjectStore, uri: str, manifest: Manifest) -> list[tuple[str, int, int]]:
    """The shards of a batch: key, first row and end."""
    shards, start = [], 0
    for key, rows in json.loads(read_checked(store, uri, manifest, CONFIG))["shards"]:
        shards.append((str(key), start, start + rows))
        start += rows
    return shards


def drop(store: ObjectStore, uri: str) -> None:
    """Delete a folder; its manifest first, so that at no time it looks whole while it is not."""
    store.delete([join_uri(uri, MANIFEST)])
    store.delete([info.uri for info in store.list(uri)])


def _open_batch(store: ObjectStore, uri: str) -> Batch | DamagedError | None:
    try:
        manifest, digest = read_checked_manifest(store, uri)
        index = safetensors.numpy.load(read_checked(store, uri, manifest, INDEX))["sha256"]
    except FileNotFoundError:
        return None  # never committed: a pass that is under way, or was killed
    except DamagedError as error:
        return error
    return Batch(uri, digest, _rows_of_bytes(index))


def _rows_of_bytes(index: Array) -> list[bytes]:
    data = index.tobytes()
    return [data[start : start + 32] for start in range(0, len(data), 32)]


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()
