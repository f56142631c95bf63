"""Data preparation without Ray: decode each new image once, split by content, and commit shards, manifest and statistics to S3.

`run` says where the work happens: `in_this_process` here, a bounded map over Ray tasks in prepare_on_ray. Crash order: shards first, then
manifest.parquet, fingerprints.parquet, quarantine.parquet and stats.json, and MANIFEST.json last; a retry writes the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median_low
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from infra import committed_folder
from infra.committed_folder import Entry, Manifest
from infra.errors import UserError
from infra.in_threads import in_threads
from infra.object_store import ObjectStore, join_uri, object_store
from ray_jobs import preprocessing
from ray_jobs.dataset import FINGERPRINTS
from ray_jobs.fingerprints import fingerprint
from ray_jobs.known_images import Facts, former_dataset, known_images
from ray_jobs.preprocessing import BadImageError
from ray_jobs.sources import (
    PREPARATION_VERSION,
    READ_THREADS,
    Item,
    Listing,
    Rejected,
    StoreFactory,
    file_limit,
    open_source,
    read_location,
)
from ray_jobs.spec import DataSpec, Spec

if TYPE_CHECKING:  # it loads rich, which workers do without
    from infra.progress import OnProgress

SPLIT_ORDER = ("train", "val", "holdout")
MIN_IMAGES_PER_CLASS = 3
CHUNK_ITEMS = 256
CHUNK_BYTES = 16 << 20
SHARD_BYTES = 64 << 20
WRITE_THREADS = 2  # each holds a few copies of one shard
WRITING_SHARE = 0.25  # of the progress shown

Job = TypeVar("Job")
Result = TypeVar("Result")


class Run(Protocol):
    """A map: calls a picklable function on each job, in any order, without taking jobs far ahead of the results."""

    def __call__(self, function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive items from number `start`; contents are bytes read here, a rejection, or None for what the task reads from S3."""

    start: int
    items: list[Item]
    contents: list[bytes | Rejected | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One image of the dataset."""

    item: Item
    facts: Facts
    split: str


@dataclass(frozen=True)
class Assembled:
    """A dataset decided upon: its rows in canonical order, and what was left out."""

    version: str
    rows: list[Row]
    quarantined: list[Rejected]
    duplicates: int
    slices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its number and its rows."""

    uri: str
    number: int
    rows: list[Row]


def in_this_process(function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
    """The plain `run`."""
    return map(function, jobs)


def prepare(spec: Spec, on_progress: OnProgress, *, run: Run = in_this_process, make_store: StoreFactory = object_store) -> dict[str, Any]:
    """Prepare the spec's source and commit it below the spec's storage. Raises UserError where no classifier can be trained on it."""
    with open_source(spec.data, make_store, spec.promotion.slices) as listing:
        total = len(listing.items) * (1 + WRITING_SHARE)
        former = former_dataset(make_store(), spec.storage, spec.name)
        look = partial(examine, max_megapixels=spec.data.max_megapixels, make_store=make_store, former=former)
        facts = _examine_all(look, listing, spec.data, run, lambda done: on_progress(done, total))
        assembled = assemble(listing, facts, spec.data, spec.promotion.slices)
        uri = join_uri(spec.storage, "datasets", spec.name, assembled.version)
        manifest = _finished(make_store(), uri)
        if manifest is None:
            read = partial(_read_again, listing)
            before = len(listing.items)
            manifest = _write(uri, assembled, read, run, make_store, lambda share: on_progress(before + share * (total - before), total))
        on_progress(total, total)
    stats = stats_of(assembled)
    shown = ("version", "images", "classes", "train", "val", "holdout", "quarantined", "duplicates", "imbalance_ratio")
    return {**{key: stats[key] for key in shown}, "uri": uri, "bytes": manifest.size_bytes}


def examine(chunk: Chunk, *, max_megapixels: float, make_store: StoreFactory, former: str | None) -> tuple[int, list[Facts | Rejected]]:
    """Hash the images of a chunk, and decode those that the former dataset does not have: its start, and what was found of each item."""
    limit, known = file_limit(max_megapixels), known_images(former, make_store)
    return chunk.start, [
        _examine_one(item, content, limit, int(max_megapixels * 1e6), make_store, known)
        for item, content in zip(chunk.items, chunk.contents, strict=True)
    ]


def split_of(item: Item, sha256: str, data: DataSpec) -> str:
    """The side of an image: as the source says, else by the digest of its group or, without one, of its own bytes.

    It depends on nothing else, so an image never changes sides when the data grows.
    """
    if item.split:
        return item.split
    digest = sha256 if item.group is None else hashlib.sha256(item.group.encode()).hexdigest()
    x = int(digest[:8], 16) / 2**32
    if x < data.val_fraction:
        return "val"
    return "holdout" if x < data.val_fraction + data.holdout_fraction else "train"


def assemble(listing: Listing, facts: Sequence[Facts | Rejected], data: DataSpec, slices: tuple[str, ...] = ()) -> Assembled:
    """Decide on the dataset: duplicates once, conflicting ones out, each image on its side. Raises UserError where a class is too small."""
    quarantined = [*listing.rejected, *(fact for fact in facts if isinstance(fact, Rejected))]
    by_digest: dict[str, list[tuple[Item, Facts]]] = {}
    for item, fact in zip(listing.items, facts, strict=True):
        if isinstance(fact, Facts):
            by_digest.setdefault(fact.sha256, []).append((item, fact))
    rows, duplicates = [], 0
    for sha256, copies in by_digest.items():
        if len({item.label for item, _ in copies}) > 1:
            quarantined += _conflicting([item for item, _ in copies])
            continue
        item, fact = min(copies, key=lambda copy: (copy[0].name, copy[0].group or "", copy[0].split or "", copy[0].slices))
        rows.append(Row(item, fact, split_of(item, sha256, data)))
        duplicates += len(copies) - 1
    rows.sort(key=lambda row: (SPLIT_ORDER.index(row.split), row.facts.sha256))
    quarantined.sort(key=lambda rejected: (rejected.name, rejected.reason, rejected.detail))
    _require_trainable(Counter(item.label for item in listing.items), rows, quarantined)
    return Assembled(version_of(rows, slices), rows, quarantined, duplicates, slices)


def version_of(rows: Iterable[Row], slices: Sequence[str] = ()) -> str:
    """32 hex digits that name the content: the same on any machine and in any listing order. Slices count where they are named."""
    digest = hashlib.sha256(json.dumps(list(slices)).encode() + b"\n" if slices else b"")
    for row in sorted(rows, key=lambda row: row.facts.sha256):
        digest.update(json.dumps([row.facts.sha256, row.item.label, row.split, row.item.group, *row.item.slices]).encode() + b"\n")
    return digest.hexdigest()[:32]


def shards_of(rows: Sequence[Row], shard_bytes: int = SHARD_BYTES) -> list[list[Row]]:
    """The rows in order, cut where a shard would exceed `shard_bytes` of images."""
    shards: list[list[Row]] = []
    filled = shard_bytes
    for row in rows:
        if filled + row.facts.size_bytes > shard_bytes or not shards:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += row.facts.size_bytes
    return shards


def stats_of(assembled: Assembled) -> dict[str, Any]:
    """The content of stats.json."""
    rows = assembled.rows
    per_class = Counter(row.item.label for row in rows)
    per_split = Counter(row.split for row in rows)
    counts = Counter((row.item.label, row.split) for row in rows)
    classes = sorted(per_class)
    return {
        "version": assembled.version,
        "preparation": PREPARATION_VERSION,
        "images": len(rows),
        "classes": classes,
        **{split: per_split[split] for split in SPLIT_ORDER},
        "quarantined": len(assembled.quarantined),
        "duplicates": assembled.duplicates,
        "counts": {label: {split: counts[label, split] for split in SPLIT_ORDER} for label in classes},
        "imbalance_ratio": round(max(per_class.values()) / min(per_class.values()), 4),
        "width": _spread([row.facts.width for row in rows]),
        "height": _spread([row.facts.height for row in rows]),
        "modes": dict(sorted(Counter(row.facts.mode for row in rows).items())),
        **({"slices": list(assembled.slices)} if assembled.slices else {}),
        "quarantine_reasons": dict(sorted(Counter(rejected.reason for rejected in assembled.quarantined).items())),
    }


def _examine_all(
    look: Callable[[Chunk], tuple[int, list[Facts | Rejected]]], listing: Listing, data: DataSpec, run: Run, on_done: Callable[[int], None]
) -> list[Facts | Rejected]:
    facts: list[Facts | Rejected | None] = [None] * len(listing.items)
    done = 0
    for start, found in run(look, _chunks(listing, data)):
        facts[start : start + len(found)] = found
        done += len(found)
        on_done(done)
    assert None not in facts
    return [fact for fact in facts if fact is not None]


def _chunks(listing: Listing, data: DataSpec) -> Iterator[Chunk]:
    """The items in chunks bounded in number and bytes, read by a few threads as they are asked for."""
    limit = file_limit(data.max_megapixels)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        start = 0
        while start < len(listing.items):
            stop, size_bytes = start, 0
            while stop < len(listing.items) and stop - start < CHUNK_ITEMS and size_bytes < CHUNK_BYTES:
                size_bytes += min(listing.items[stop].size_bytes, limit)
                stop += 1
            items = listing.items[start:stop]
            yield Chunk(start, items, list(pool.map(lambda item: _content(listing, item, limit), items)))
            start = stop


def _content(listing: Listing, item: Item, limit: int) -> bytes | Rejected | None:
    if item.size_bytes > limit:
        return Rejected(item.name, "oversized", f"{item.size_bytes} bytes, more than the limit of {limit >> 20} MiB")
    if item.location.startswith("s3://"):
        return None
    try:
        return listing.read(item)
    except BadImageError as error:
        return Rejected(item.name, error.reason, error.detail)


def _examine_one(
    item: Item, content: bytes | Rejected | None, limit: int, max_pixels: int, make_store: StoreFactory, known: Mapping[str, Facts]
) -> Facts | Rejected:
    if isinstance(content, Rejected):
        return content
    try:
        data = read_location(item.location, limit, make_store) if content is None else content
        sha256 = hashlib.sha256(data).hexdigest()
        before = known.get(sha256)
        if before and before.width * before.height <= max_pixels:
            return before
        decoded = preprocessing.decode_file(data, max_pixels)
    except BadImageError as error:
        return Rejected(item.name, error.reason, error.detail)
    width, height = decoded.image.size
    return Facts(sha256, width, height, decoded.mode, decoded.format, len(data), fingerprint(decoded.image))


def _conflicting(items: list[Item]) -> list[Rejected]:
    labels = sorted({item.label for item in items})
    detail = f"the same image has the labels {', '.join(map(repr, labels))}"
    return [Rejected(item.name, "conflicting_labels", detail) for item in items]


def _require_trainable(listed: Counter[str], rows: Sequence[Row], quarantined: Sequence[Rejected]) -> None:
    usable = Counter(row.item.label for row in rows)
    if not rows:
        first = f" The first: {quarantined[0].name}: {quarantined[0].reason}, {quarantined[0].detail}." if quarantined else ""
        way_out = f"The formats are {', '.join(preprocessing.FORMATS)}."
        raise UserError(f"None of the {listed.total()} files is a usable image.{first}", way_out)
    train = Counter(row.item.label for row in rows if row.split == "train")
    small = [label for label in sorted(listed) if usable[label] < MIN_IMAGES_PER_CLASS or not train[label]]
    if small:
        lines = [f"  {label!r}: {listed[label]} files, {usable[label]} usable images, {train[label]} in train" for label in small[:10]]
        more = f"\n  and {len(small) - 10} more" if len(small) > 10 else ""
        raise UserError(
            f"{len(small)} of {len(listed)} classes {'is' if len(small) == 1 else 'are'} too small to split:\n" + "\n".join(lines) + more,
            f"Each class needs {MIN_IMAGES_PER_CLASS} usable images and one of them in train: add images, or leave the class out.",
        )
    for split, key in (("val", "val_fraction"), ("holdout", "holdout_fraction")):
        if not any(row.split == split for row in rows):
            way_out = f"Add images, raise data.{key}, or name the images of {split} in the manifest's split column."
            raise UserError(f"None of the {len(rows)} images is in {split}.", way_out)


def _finished(store: ObjectStore, uri: str) -> Manifest | None:
    """The folder's manifest; None where there is none yet, or former code wrote the folder: then it is written anew, with what is new."""
    manifest = committed_folder.read_manifest(store, uri)
    if manifest is None or json.loads(store.read(join_uri(uri, "stats.json"))).get("preparation") != PREPARATION_VERSION:
        return None
    return manifest


def _read_again(listing: Listing, item: Item) -> bytes:
    return listing.read(item)


def _write(
    uri: str, assembled: Assembled, read: Callable[[Item], bytes], run: Run, make_store: StoreFactory, on_share: Callable[[float], None]
) -> Manifest:
    from ray_jobs import dataset_tables

    shards = shards_of(assembled.rows)
    jobs = [ShardJob(uri, number, rows) for number, rows in enumerate(shards)]
    everything_on_s3 = all(row.item.location.startswith("s3://") for row in assembled.rows)
    entries: list[Entry] = []
    written = (
        run(partial(write_shard, read=None, make_store=make_store), jobs)  # the tasks read their share themselves
        if everything_on_s3
        else in_threads(partial(write_shard, read=read, make_store=make_store), jobs, WRITE_THREADS)
    )
    for entry in written:
        entries.append(entry)
        on_share(len(entries) / len(jobs))
    files = {
        "manifest.parquet": dataset_tables.manifest_bytes(shards, assembled.slices),
        FINGERPRINTS: dataset_tables.fingerprints_bytes(shards),
        "quarantine.parquet": dataset_tables.quarantine_bytes(assembled.quarantined),
        "stats.json": json.dumps(stats_of(assembled), indent=1, ensure_ascii=False).encode(),
    }
    already_there = Manifest(tuple(sorted(entries, key=lambda entry: entry.key)))
    return committed_folder.commit(make_store(), uri, files, already_there=already_there).manifest


def write_shard(job: ShardJob, *, read: Callable[[Item], bytes] | None, make_store: StoreFactory) -> Entry:
    """Read the images of one shard again, check that they are the ones that were examined, and write it to S3."""
    from ray_jobs import dataset_tables

    images = []
    for row in job.rows:
        try:
            data = read(row.item) if read else read_location(row.item.location, row.facts.size_bytes, make_store)
        except BadImageError as error:
            raise _changed(row) from error
        if hashlib.sha256(data).hexdigest() != row.facts.sha256:
            raise _changed(row)
        images.append(data)
    content = dataset_tables.shard_bytes(job.rows, images)
    key = f"shards/{job.number:05}.parquet"
    make_store().write(join_uri(job.uri, key), content)
    return Entry(key, len(content), hashlib.sha256(content).hexdigest())


def _changed(row: Row) -> UserError:
    what = f"The source changed while it was being prepared: {row.item.name}."
    return UserError(what, "Run the same command again when nothing writes to it.")


def _spread(values: list[int]) -> dict[str, int]:
    return {"min": min(values), "median": median_low(values), "max": max(values)}
