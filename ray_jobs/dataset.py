"""Reading a prepared dataset: its rows, and the bytes of its images, from a checked local copy of just the shards that are needed."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra import committed_folder
from infra.committed_folder import Manifest
from infra.errors import UserError
from infra.object_store import ObjectStore

FINGERPRINTS = "fingerprints.parquet"


@dataclass(frozen=True, slots=True)
class Row:
    """One image: `index` counts through the whole dataset in canonical order, `label_index` through its sorted classes."""

    index: int
    sha256: str
    label_index: int
    split: str
    name: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of consecutive rows, `start` to `stop` (exclusive)."""

    key: str
    start: int
    stop: int
    size_bytes: int


class Dataset:
    """A committed dataset at `uri`; files are fetched into `cache_folder` on first use."""

    def __init__(self, uri: str, store: ObjectStore, cache_folder: Path, committed: Manifest) -> None:
        self.uri = uri
        self.store = store
        self.cache_folder = cache_folder
        self.committed = committed

    @cached_property
    def stats(self) -> dict[str, Any]:
        """The content of stats.json."""
        return dict(json.loads(self._file("stats.json").read_bytes()))

    @property
    def version(self) -> str:
        return str(self.stats["version"])

    @property
    def classes(self) -> list[str]:
        """The labels; an image's label index counts through them."""
        return list(self.stats["classes"])

    @cached_property
    def manifest(self) -> pa.Table:
        """manifest.parquet: every row in canonical order."""
        return _read(self._file("manifest.parquet"))

    @cached_property
    def quarantine(self) -> pa.Table:
        """quarantine.parquet: every file left out, and why."""
        return _read(self._file("quarantine.parquet"))

    def fingerprints(self) -> npt.NDArray[np.uint8] | None:
        """What each image looks like (ray_jobs.fingerprints), in the manifest's order; None where former code prepared the dataset."""
        if not any(entry.key == FINGERPRINTS for entry in self.committed.objects):
            return None
        column = _read(self._file(FINGERPRINTS)).column("fingerprint").combine_chunks()
        width = column.type.byte_width
        content = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
        return content.reshape(len(column), width)

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row in canonical order."""
        label_indices = {label: index for index, label in enumerate(self.classes)}
        columns = (self.manifest.column(name).to_pylist() for name in ("sha256", "label", "split", "name"))
        return [
            Row(index, sha256, label_indices[label], split, name)
            for index, (sha256, label, split, name) in enumerate(zip(*columns, strict=True))
        ]

    def rows(self, splits: Collection[str]) -> list[Row]:
        """The rows of these splits, in canonical order."""
        return [row for row in self.all_rows if row.split in splits]

    def shards(self) -> list[Shard]:
        """The shards in order, for workers to share the rows among them."""
        return list(self._shards)

    def images(self, splits: Collection[str]) -> Iterator[tuple[Row, bytes]]:
        """The rows of these splits with the original bytes of their images, in canonical order."""
        rows = self.rows(splits)
        return zip(rows, self.image_bytes_at([row.index for row in rows]), strict=True)

    def image_bytes(self, start: int, stop: int) -> Iterator[bytes]:
        """The original bytes of the images `start` to `stop` (exclusive) in canonical order."""
        assert 0 <= start <= stop <= self.manifest.num_rows, (start, stop, self.manifest.num_rows)
        return self.image_bytes_at(range(start, stop))

    def image_bytes_at(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The original bytes of the images of these rising numbers; reads no row group without one of them."""
        for shard in self._shards:
            first, last = bisect_left(indices, shard.start), bisect_left(indices, shard.stop)
            if first < last:
                yield from _images_of(self._file(shard.key), [index - shard.start for index in indices[first:last]])

    @cached_property
    def _shards(self) -> list[Shard]:
        entries = [entry for entry in self.committed.objects if entry.key.startswith("shards/")]
        counts = [0] * len(entries)
        for number in self.manifest.column("shard").to_pylist():
            counts[number] += 1
        stops = list(accumulate(counts))
        return [Shard(e.key, stop - count, stop, e.size) for e, count, stop in zip(entries, counts, stops, strict=True)]

    def _file(self, key: str) -> Path:
        entry = next(entry for entry in self.committed.objects if entry.key == key)
        return committed_folder.fetch_object(self.store, self.uri, entry, self.cache_folder)


def open_dataset(uri: str, store: ObjectStore, cache_folder: Path) -> Dataset:
    """The dataset committed at `uri`. Raises UserError where there is none."""
    committed = committed_folder.read_manifest(store, uri)
    if committed is None:
        raise UserError(f"There is no prepared dataset at {uri}.", "Run `unfreeze retrain` again to prepare it.")
    return Dataset(uri, store, cache_folder, committed)


def _read(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _images_of(path: Path, rows: Sequence[int]) -> Iterator[bytes]:
    """The images in these rising rows of one shard, one row group in memory at a time."""
    with pq.ParquetFile(path, memory_map=True) as file:
        bounds = [0, *accumulate(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            inside = rows[bisect_left(rows, start) : bisect_left(rows, stop)]
            if inside:
                column = file.read_row_group(number, columns=["image"]).column("image")
                yield from (column[row - start].as_py() for row in inside)
