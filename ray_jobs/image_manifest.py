"""A source given as a table: one row an image, with its label and perhaps its group and split (.csv, .tsv or .parquet).

Further columns are read where the spec names them as slices; an empty cell is a value of its own, EMPTY.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.object_store import ObjectInfo, ObjectStore, join_uri, split_uri
from ray_jobs.sources import SPLITS, Item, Rejected, StoreFactory, as_label, digests_of_files, missing_source, storable, with_group_splits

COLUMNS = ("image", "label", "group", "split")
EMPTY = "(empty)"
_WAY_OUT = "A manifest needs the columns image and label, and may have group and split (train, val or holdout)."


@dataclass(frozen=True, slots=True)
class _Line:
    """One row: texts as written, None where empty; `number` counts from 1 without the header."""

    number: int
    image: str | None
    label: str | None
    group: str | None
    split: str | None
    slices: tuple[str, ...]


def read_image_manifest(source: str, make_store: StoreFactory, slices: Sequence[str] = ()) -> tuple[list[Item], list[Rejected]]:
    """The manifest's rows as items, and the rows without an image or a label. Raises UserError where the table itself is wrong."""
    items: list[Item] = []
    rejected: list[Rejected] = []
    lines = list(_lines(source, make_store, slices))
    sizes = {uri: info.size_bytes for uri, info in _listed(_remote(source, lines), make_store).items()}
    for line in lines:
        name = storable(line.image or f"row {line.number}")
        if not line.image:
            rejected.append(Rejected(name, "missing", "the row names no image"))
        elif not line.label or not as_label(line.label):
            rejected.append(Rejected(name, "no_label", f"row {line.number} has no label"))
        elif not (location := _location(source, line.image)):
            rejected.append(Rejected(name, "unsafe_path", "a manifest on S3 names a file of this machine"))
        else:
            size_bytes = sizes.get(location, 0) if location.startswith("s3://") else _size(location)
            group = line.group and storable(line.group)
            items.append(Item(name, as_label(line.label), location, size_bytes, group, _split(source, line), line.slices))
    if not items and not rejected:
        raise UserError(f"The manifest {storable(source)!r} is empty: it has no rows.", _WAY_OUT)
    return with_group_splits(items), rejected


def fingerprint_of_manifest(source: str, make_store: StoreFactory, slices: Sequence[str] = ()) -> list[Any]:
    """What changes when the manifest or any image that it names does."""
    lines = list(_lines(source, make_store, slices))
    locations = [_location(source, line.image) if line.image else "" for line in lines]
    remote = _listed(_remote(source, lines), make_store)
    local = [location for location in locations if location and not location.startswith("s3://")]
    digests = dict(zip(local, digests_of_files(local), strict=True))
    state = {**digests, **{uri: f"{info.size_bytes} {info.etag}" for uri, info in remote.items()}}
    return [
        [
            *(text and storable(text) for text in (line.image, line.label, line.group, line.split)),
            *line.slices,
            state.get(location, "missing"),
        ]
        for line, location in zip(lines, locations, strict=True)
    ]


def _lines(source: str, make_store: StoreFactory, slices: Sequence[str]) -> Iterator[_Line]:
    data = _bytes_of(source, make_store)
    try:
        columns, rows = _parquet(data, slices) if source.lower().endswith((".parquet", ".pq")) else _csv(data, source)
    except (csv.Error, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(f"The manifest {storable(source)!r} cannot be read: {storable(str(error))}", _WAY_OUT) from None
    missing = [name for name in COLUMNS[:2] if name not in columns]
    if missing:
        found = ", ".join(map(repr, columns)) or "none"
        raise UserError(f"The manifest {storable(source)!r} lacks {' and '.join(map(repr, missing))}; its columns are: {found}.", _WAY_OUT)
    absent = ", ".join(repr(name) for name in slices if name not in columns)
    if absent:
        found = ", ".join(map(repr, columns))
        raise UserError(
            f"The manifest {storable(source)!r} lacks {absent}, which promotion.slices names; its columns are: {found}.",
            "Mend promotion.slices in the spec, or add the columns to the manifest.",
        )
    for number, row in enumerate(rows, 1):
        values = tuple(storable(_text(row.get(name)) or EMPTY) for name in slices)
        image, label, group, split = (_text(row.get(name)) for name in COLUMNS)
        yield _Line(number, image, label, group, split, values)


def _bytes_of(source: str, make_store: StoreFactory) -> bytes:
    try:
        return make_store().read(source) if source.startswith("s3://") else Path(source).read_bytes()
    except FileNotFoundError:
        raise missing_source(source) from None
    except OSError as error:
        raise UserError(f"The manifest {storable(source)!r} cannot be read: {error.strerror}.", _WAY_OUT) from None


def _csv(data: bytes, source: str) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")  # a file name need not be UTF-8
    delimiter = "\t" if source.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [storable(name).strip().lower() for name in next(reader, [])]
    rows = [dict(zip(columns, row, strict=False)) for row in reader if row]
    return columns, iter(rows)


def _parquet(data: bytes, slices: Sequence[str]) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(io.BytesIO(data)).read()
    table = table.rename_columns([name.strip().lower() for name in table.column_names])
    columns = table.column_names
    wanted = [name for name in dict.fromkeys((*COLUMNS, *slices)) if name in columns]
    image = table.schema.field("image").type if columns.count("image") == 1 else pa.string()
    if pa.types.is_nested(image) or pa.types.is_binary(image):
        raise ValueError(f"its column image holds {image}, not paths")
    return columns, iter(table.select(wanted).to_pylist())


def _text(value: Any) -> str | None:
    """A cell as text: None where empty; 3.0 is 3, because a gap turns a column of integers into floats."""
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return text.replace("\0", "").strip() or None


def _split(source: str, line: _Line) -> str | None:
    if line.split is None:
        return None
    split = SPLITS.get(line.split.lower())
    if split is None:
        raise UserError(
            f"The manifest {storable(source)!r} has an unknown split {storable(line.split)!r} in row {line.number}.",
            "Write train, val or holdout, or leave the cell empty to have the image split by its content.",
        )
    return split


def _location(source: str, image: str) -> str:
    """Where an image lies: as written when absolute or on S3, else relative to the manifest; "" where that may not be told from S3."""
    if image.startswith("s3://"):
        return image
    if os.path.isabs(image):
        return "" if source.startswith("s3://") else image
    if source.startswith("s3://"):
        bucket, key = split_uri(source)
        return f"s3://{bucket}" + posixpath.normpath(posixpath.join("/", posixpath.dirname(key), image))
    return os.path.join(os.path.dirname(os.path.abspath(source)), image)


def _remote(source: str, lines: list[_Line]) -> set[str]:
    locations = (_location(source, line.image) for line in lines if line.image)
    return {location for location in locations if location.startswith("s3://")}


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, UnicodeError):  # reading it will say what is wrong
        return 0


def _listed(uris: set[str], make_store: StoreFactory) -> dict[str, ObjectInfo]:
    """What S3 says of each object, by listing the folders that hold them rather than asking one by one."""
    if not uris:
        return {}
    store: ObjectStore = make_store()
    folders = sorted({join_uri(uri.rpartition("/")[0]) for uri in uris})
    outermost: list[str] = []
    for folder in folders:
        if not outermost or not (folder + "/").startswith(outermost[-1] + "/"):
            outermost.append(folder)
    infos = {info.uri: info for folder in outermost for info in store.list(folder)}
    return {uri: infos[uri] for uri in uris if uri in infos}
