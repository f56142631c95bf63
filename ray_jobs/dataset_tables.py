"""The Parquet files of a prepared dataset, as bytes.

Columns are built from buffers: `pyarrow.array` would import pandas, which costs each process more than a second.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.fingerprints import FINGERPRINT_BYTES

if TYPE_CHECKING:
    from ray_jobs.prepare import Row
    from ray_jobs.sources import Rejected

ROW_GROUP_BYTES = 8 << 20


def shard_bytes(rows: Sequence[Row], images: Sequence[bytes]) -> bytes:
    """One shard: the rows with the original bytes of their images, in row groups of about 8 MB."""
    columns = {
        "sha256": _texts([row.facts.sha256 for row in rows]),
        "label": _texts([row.item.label for row in rows]),
        "split": _texts([row.split for row in rows]),
        "group": _texts([row.item.group for row in rows]),
        "name": _texts([row.item.name for row in rows]),
        "image": _column([*images], pa.binary()),
    }
    mean_bytes = max(1, sum(map(len, images)) // max(1, len(images)))
    return _parquet(columns, row_group_size=max(1, ROW_GROUP_BYTES // mean_bytes), use_dictionary=["label", "split", "group"])


def manifest_bytes(shards: Sequence[Sequence[Row]], slices: Sequence[str] = ()) -> bytes:
    """manifest.parquet: every row in canonical order, with its place in the shards, and a column a slice."""
    rows = [row for shard in shards for row in shard]
    return _parquet({
        "sha256": _texts([row.facts.sha256 for row in rows]),
        "label": _texts([row.item.label for row in rows]),
        "split": _texts([row.split for row in rows]),
        "group": _texts([row.item.group for row in rows]),
        "name": _texts([row.item.name for row in rows]),
        "width": _numbers([row.facts.width for row in rows], pa.int32()),
        "height": _numbers([row.facts.height for row in rows], pa.int32()),
        "mode": _texts([row.facts.mode for row in rows]),
        "format": _texts([row.facts.format for row in rows]),
        "size_bytes": _numbers([row.facts.size_bytes for row in rows], pa.int64()),
        "shard": _numbers([number for number, shard in enumerate(shards) for _ in shard], pa.int32()),
        "row": _numbers([number for shard in shards for number in range(len(shard))], pa.int32()),
        **{slice_column(name): _texts([row.item.slices[number] for row in rows]) for number, name in enumerate(slices)},
    })  # fmt: skip


def slice_column(name: str) -> str:
    """The column that holds a slice: under a name that none of ours can have."""
    return f"slice:{name}"


def fingerprints_bytes(shards: Sequence[Sequence[Row]]) -> bytes:
    """fingerprints.parquet: what each image looks like, in the manifest's order; apart from it, since workers read that and not this."""
    content = b"".join(row.facts.fingerprint for shard in shards for row in shard)
    column = pa.Array.from_buffers(pa.binary(FINGERPRINT_BYTES), len(content) // FINGERPRINT_BYTES, [None, pa.py_buffer(content)])
    return _parquet({"fingerprint": column}, use_dictionary=False)


def quarantine_bytes(quarantined: Sequence[Rejected]) -> bytes:
    """quarantine.parquet: every file left out, and why."""
    return _parquet({
        "name": _texts([rejected.name for rejected in quarantined]),
        "reason": _texts([rejected.reason for rejected in quarantined]),
        "detail": _texts([rejected.detail for rejected in quarantined]),
    })  # fmt: skip


def _parquet(columns: dict[str, pa.Array], row_group_size: int = 1 << 20, use_dictionary: bool | list[str] = True) -> bytes:
    table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", row_group_size=row_group_size, use_dictionary=use_dictionary, write_statistics=False)
    return sink.getvalue()


def _texts(values: Sequence[str | None]) -> pa.Array:
    return _column([None if value is None else value.encode() for value in values], pa.string())


def _column(values: Sequence[bytes | None], kind: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value or b"") for value in values], out=offsets[1:])
    present = np.packbits([value is not None for value in values], bitorder="little") if None in values else None
    content = b"".join(value or b"" for value in values)
    buffers = [None if present is None else pa.py_buffer(present), pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _numbers(values: Sequence[int], kind: pa.DataType) -> pa.Array:
    content = np.array(values, dtype=f"int{kind.bit_width}")
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(content)])
