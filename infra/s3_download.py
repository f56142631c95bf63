"""One object from S3: whole where it is small, else in ranges beside each other, such that what arrived is not fetched again.

`PATH.partial` fills up, and `PATH.ranges` lists which ranges of which object lie in it; PATH is there once all of it is.
Crash order: a range, then its line in the list; at the end the partial file takes its name, then the list goes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import usage
from infra.errors import ServiceError
from infra.in_threads import in_threads
from infra.s3_client import S3Access
from infra.s3_errors import Altered
from infra.s3_upload import PART_THREADS, RESTARTS, WHOLE_BYTES, Part, Place, md5, md5_of, parts_of
from infra.usage import Usage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Version:
    """Which content of an object: its ETag and its size in bytes."""

    etag: str
    size: int


class Changed(Exception):  # noqa: N818 - its name is what happened
    """Another object took the place of the one that was being fetched."""


def get(access: S3Access, place: Place) -> bytes:
    """The content of an object."""
    found = _get(access, place, None)
    assert isinstance(found, bytes)
    return found


def download(access: S3Access, place: Place, path: Path) -> None:
    """The object as a file, complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    for _ in range(RESTARTS):
        found = _get(access, place, WHOLE_BYTES)
        if isinstance(found, bytes):
            partial.write_bytes(found)
            partial.replace(path)
            return
        with suppress(Changed):
            _in_ranges(access, place, found, path)
            return
    raise ServiceError(f"{place.uri} was replaced {RESTARTS} times while it was fetched.", "The same command carries on.")


def _get(access: S3Access, place: Place, limit: int | None) -> bytes | Version:
    """The whole object, or which one it is where it is larger than the limit. What does not match its ETag is fetched again:
    the same once more, and it is the ETag that is no MD5."""
    seen: set[str] = set()

    def request(client: S3Client) -> bytes | Version:
        answer = client.get_object(Bucket=place.bucket, Key=place.key)
        if limit is not None and answer["ContentLength"] > limit:
            answer["Body"].close()
            return Version(answer["ETag"], answer["ContentLength"])
        data = answer["Body"].read()
        expected, digest = md5_of(answer), md5(data)
        if expected not in (None, digest) and digest not in seen:
            seen.add(digest)
            raise Altered(f"{place.uri} was altered on its way from S3 (MD5 {expected}, arrived {digest})")
        return data

    found = access.ask("GetObject", place.uri, request)
    if isinstance(found, bytes):
        usage.add(Usage(s3_read_bytes=len(found)))
    return found


def _in_ranges(access: S3Access, place: Place, version: Version, path: Path) -> None:
    partial, ranges = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.ranges")
    arrived = _arrived(ranges, version) if partial.exists() else set()
    if not arrived:
        partial.unlink(missing_ok=True)
        ranges.write_text(json.dumps(asdict(version)) + "\n")
    writing = threading.Lock()
    with partial.open("r+b" if arrived else "w+b") as file, ranges.open("a") as lines:

        def fetch(part: Part) -> None:
            data = access.ask("GetObject", place.uri, lambda client: _range(client, place, version, part))
            usage.add(Usage(s3_read_bytes=len(data)))
            _write_at(file.fileno(), data, part.start)
            with writing:
                lines.write(f"{part.number}\n")
                lines.flush()

        missing = [part for part in parts_of(version.size) if part.number not in arrived]
        for _ in in_threads(fetch, missing, PART_THREADS):
            pass
    partial.replace(path)
    ranges.unlink()


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    """All of it: a disk that gets full takes what still fits, and only says so when it is asked for more."""
    left = memoryview(data)
    while left:
        left = left[os.pwrite(descriptor, left, start + len(data) - len(left)) :]


def _range(client: S3Client, place: Place, version: Version, part: Part) -> bytes:
    answer = client.get_object(Bucket=place.bucket, Key=place.key, Range=f"bytes={part.start}-{part.start + part.size - 1}")
    if answer["ETag"] != version.etag:
        raise Changed
    data = answer["Body"].read()
    if len(data) != part.size:
        raise Altered(f"{len(data)} of {part.size} bytes of {place.uri} arrived")
    return data


def _arrived(ranges: Path, version: Version) -> set[int]:
    """The numbers of the ranges that lie in the partial file; none where they are of another object."""
    try:
        first, *lines = ranges.read_text().split("\n")
        known: Mapping[str, Any] = json.loads(first)
    except (OSError, ValueError):
        return set()
    if known != asdict(version):
        return set()
    return {int(line) for line in lines[:-1] if line.isdecimal()}  # the last line may be cut short
