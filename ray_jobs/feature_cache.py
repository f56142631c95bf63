"""The feature cache: what crosses a cut, a row an image; shards on S3, memory-mapped on each machine.

One folder a cut: features/FEATURE_KEY/{00000.safetensors ..., config.json, MANIFEST.json}. Shard i holds the tensors v0, v1, ... (the
values that cross the cut) and `labels` of a contiguous range of rows, in the dataset's canonical order: train, then val.

Crash order: shards first, each by whoever computed it; the manifest last. Without it no reader sees the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from infra.committed_folder import Committed, Entry, Manifest, commit, fetch, read_manifest
from infra.object_store import ObjectStore, join_uri
from ray_jobs.spec import digest_of

FEATURE_CODE_VERSION = 1
"""Raise it whenever the code computes other features from the same weights and images."""


@dataclass(frozen=True)
class FeatureIdentity:
    """Everything that the features of one cut depend on."""

    backbone_digest: str
    unfreeze_depth: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset_version: str
    view: str = "centre"
    dtype: str = "float32"

    @property
    def key(self) -> str:
        return digest_of({"code": FEATURE_CODE_VERSION, **{name: _plain(value) for name, value in vars(self).items()}})


@dataclass(frozen=True)
class Features:
    """The rows of one cut on this machine: arrays mapped copy-on-write: torch takes them without a copy, nobody alters the file."""

    values: list[NDArray[Any]]
    labels: NDArray[np.int64]
    train: int
    val: int

    @property
    def size_bytes(self) -> int:
        return sum(value.nbytes for value in self.values)


def write_shard(store: ObjectStore, uri: str, index: int, values: Sequence[NDArray[Any]], labels: NDArray[np.int64]) -> Entry:
    """Write the rows of shard `index` and return what the manifest must say of it."""
    tensors = {f"v{i}": np.ascontiguousarray(value) for i, value in enumerate(values)}
    data = save({**tensors, "labels": labels})
    key = f"{index:05d}.safetensors"
    store.write(join_uri(uri, key), data)
    return Entry(key, len(data), hashlib.sha256(data).hexdigest())


def commit_features(store: ObjectStore, uri: str, entries: Sequence[Entry], config: Mapping[str, Any]) -> Committed:
    """Make the written shards a cache that readers see. `config` must hold the counts `train` and `val`."""
    files: dict[str, Path | bytes] = {"config.json": json.dumps(config, indent=1, sort_keys=True).encode()}
    return commit(store, uri, files, already_there=Manifest(tuple(entries)))


def open_features(uri: str, store: ObjectStore, cache_folder: Path) -> Features:
    """The features at `uri`, from this machine's copy; the first caller on a machine fetches, checks and assembles it.

    Raises FileNotFoundError where they were never committed, ValueError where a shard does not match its digest.
    """
    manifest = read_manifest(store, uri)
    if manifest is None:
        raise FileNotFoundError(uri)
    folder = cache_folder / "features"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / hashlib.sha256(uri.encode() + manifest.to_json()).hexdigest()[:32]
    with FileLock(f"{target}.lock"):
        if not target.exists():
            shards = fetch(store, uri, cache_folder / "fetched")
            _assemble(shards, target)
            shutil.rmtree(shards)  # its rows now lie in the assembled arrays
    return _mapped(target)


def _assemble(shards: Path, target: Path) -> None:
    """One .npy per value out of all shards, written aside and renamed into place."""
    aside = target.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    config = json.loads((shards / "config.json").read_text())
    rows = config["train"] + config["val"]
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for path in sorted(shards.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_tensor(name)
                if name not in arrays:
                    shape = (rows, *part.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(aside / f"{name}.npy", mode="w+", dtype=part.dtype, shape=shape)
                arrays[name][start : start + len(part)] = part
        start += len(part)
    if start != rows:
        raise ValueError(f"{shards} holds {start} rows, but its config.json says {rows}")
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]  # a memmap
    shutil.copy(shards / "config.json", aside / "config.json")
    aside.rename(target)


def _mapped(folder: Path) -> Features:
    config = json.loads((folder / "config.json").read_text())
    count = len(list(folder.glob("v*.npy")))
    values = [np.load(folder / f"v{i}.npy", mmap_mode="c") for i in range(count)]
    return Features(values, np.load(folder / "labels.npy"), config["train"], config["val"])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
