"""Features on this machine: one memory-mapped array a value for each selection, assembled once and shared by all workers.

CACHE/features/DIGEST/{v0.npy, ..., labels.npy, contents.json}: contents.json holds the sha256 of each array and its own, its time
stamp says when the arrays were last used. A folder is made aside and renamed; what does not match its digests is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from infra.committed_folder import Manifest
from infra.in_threads import in_threads
from infra.object_store import ObjectStore
from infra.settings import cache_bytes
from ray_jobs.feature_batches import THREADS, Array, DamagedError, Selection, open_selection, read_checked, read_checked_manifest, shards_of
from ray_jobs.spec import digest_of

if TYPE_CHECKING:
    from torch import Tensor

CONTENTS = "contents.json"


@dataclass(frozen=True)
class Features:
    """The rows of one cut on this machine, mapped copy-on-write: torch takes them without a copy, nobody alters the file.

    `values` hold the train and val rows of view 0, then the train rows of view 1, of view 2, ...; `labels` those of train and val.
    bfloat16, which NumPy lacks, lies there as uint16: take `tensors()`.
    """

    values: list[NDArray[Any]]
    labels: NDArray[np.int64]
    train: int
    val: int
    views: int = 1

    @property
    def size_bytes(self) -> int:
        return sum(value.nbytes for value in self.values)

    def row(self, train_row: Any, view: Any) -> Any:
        """The array row of a train row's view; takes numbers, arrays or tensors."""
        return train_row + (view > 0) * (self.val + view * self.train)

    def tensors(self) -> list[Tensor]:
        """The values for torch, without a copy, in the type in which they are stored."""
        import torch

        tensors = [torch.from_numpy(value) for value in self.values]
        return [tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor for tensor in tensors]


@dataclass(frozen=True)
class LocalCopy:
    """One assembled folder: its size, and when it was last used (seconds since 1970)."""

    path: Path
    size_bytes: int
    used_at: float


def open_features(uri: str, store: ObjectStore, cache_folder: Path, *, budget_bytes: int | None = None) -> Features:
    """The features that the selection at `uri` names, from this machine's copy; the first caller on a machine assembles it.

    Raises FileNotFoundError where they were never committed, DamagedError where a batch or the selection does not match its digests.
    """
    folder = cache_folder / "features"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / hashlib.sha256(uri.encode()).hexdigest()[:32]
    with FileLock(f"{target}.lock"):
        body = _checked(target)
        if body is None:
            shutil.rmtree(target, ignore_errors=True)
            body = _assemble(uri, store, target, cache_bytes() if budget_bytes is None else budget_bytes)
        with suppress(OSError):
            os.utime(target / CONTENTS)
        values = [np.load(target / f"v{i}.npy", mmap_mode="c") for i in range(body["count"])]
        return Features(values, np.load(target / "labels.npy"), body["train"], body["val"], body["views"])


def local_copies(cache_folder: Path) -> list[LocalCopy]:
    """What lies on this machine, the least recently used first."""
    copies = []
    for path in (cache_folder / "features").glob("*/"):
        with suppress(OSError):
            used_at = (path / CONTENTS).stat().st_mtime
            copies.append(LocalCopy(path, sum(file.stat().st_size for file in path.iterdir()), used_at))
    return sorted(copies, key=lambda copy: copy.used_at)


def evict(copies: Sequence[LocalCopy], budget_bytes: float) -> list[LocalCopy]:
    """Which copies must go, the least recently used first, so that the rest fits the budget."""
    left, gone = sum(copy.size_bytes for copy in copies), []
    for copy in copies:
        if left > budget_bytes:
            gone.append(copy)
            left -= copy.size_bytes
    return gone


def remove(copy: LocalCopy) -> bool:
    """Delete a copy unless someone is just opening it. Those who have it mapped keep it."""
    try:
        with FileLock(f"{copy.path}.lock", timeout=0):
            aside = copy.path.with_suffix(".gone")
            if aside != copy.path:
                shutil.rmtree(aside, ignore_errors=True)  # of one that was killed here
                copy.path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            return True
    except (Timeout, OSError):
        return False


def _assemble(uri: str, store: ObjectStore, target: Path, budget_bytes: int) -> dict[str, Any]:
    """Gather the rows from their batches into one .npy a value, aside; then rename."""
    selection = open_selection(store, uri)
    aside = target.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    jobs = list(_jobs(store, selection))
    size_bytes = sum(entry_bytes for *_, entry_bytes in jobs)
    for copy in evict(local_copies(target.parent.parent), budget_bytes - size_bytes):
        remove(copy)
    gather = _Gather(store, aside, len(selection.row_of))
    first, *rest = jobs
    gather(*first[:5])  # makes the arrays
    for _ in in_threads(lambda job: gather(*job[:5]), rest, THREADS):
        pass
    np.save(aside / "labels.npy", selection.labels)
    body = {
        "uri": uri, "train": selection.train, "val": len(selection.labels) - selection.train, "views": selection.views,
        "count": len(gather.arrays), "sha256": _digests(aside),
    }  # fmt: skip
    (aside / CONTENTS).write_text(json.dumps({"body": body, "sha256": digest_of(body)}))
    aside.rename(target)
    return body


Job = tuple[str, Manifest, str, NDArray[np.int64], NDArray[np.int64], int]


def _jobs(store: ObjectStore, selection: Selection) -> Iterator[Job]:
    """A job a needed shard: batch, manifest, key, rows within the shard, where they go, and the shard's size in bytes."""
    for number, (uri, digest) in enumerate(selection.batches):
        try:
            manifest, found = read_checked_manifest(store, uri)
        except FileNotFoundError:
            raise DamagedError(uri, "it is gone") from None
        if found != digest:
            raise DamagedError(uri, "its manifest is another one than when it was selected")
        wanted = np.flatnonzero(selection.batch_of == number)
        rows = selection.row_of[wanted]
        sizes = {entry.key: entry.size for entry in manifest.objects}
        for key, start, stop in shards_of(store, uri, manifest):
            inside = (rows >= start) & (rows < stop)
            if inside.any():
                yield uri, manifest, key, rows[inside] - start, wanted[inside], sizes.get(key, 0)


class _Gather:
    """Copies rows of shards to their places in the assembled arrays."""

    def __init__(self, store: ObjectStore, folder: Path, rows: int) -> None:
        self.store, self.folder, self.rows = store, folder, rows
        self.arrays: dict[str, Array] = {}

    def __call__(self, uri: str, manifest: Manifest, key: str, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        values = safetensors.numpy.load(read_checked(self.store, uri, manifest, key))
        for name, value in values.items():
            if name not in self.arrays:
                shape = (self.rows, *value.shape[1:])
                self.arrays[name] = _new_array(self.folder / f"{name}.npy", value.dtype, shape)
            self.arrays[name][target] = value[source]


def _new_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """A mapped .npy. Its room is taken now: on a full disk this is an error, later it would be a signal (SIGBUS) that ends the process."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _digests(folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor(THREADS) as pool:
        paths = sorted(folder.glob("*.npy"))
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(folder: Path) -> dict[str, Any] | None:
    """What an assembled folder says of itself; None where there is none, or any byte of it is not what was written."""
    try:
        content = json.loads((folder / CONTENTS).read_text())
        body: dict[str, Any] = content["body"]
        return body if content["sha256"] == digest_of(body) and body["sha256"] == _digests(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
