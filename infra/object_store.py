"""The seam to S3: whole objects by URI. How it is asked is in s3_client.py, what it may answer in s3_errors.py, and how objects travel in
s3_upload.py and s3_download.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from infra import patience
from infra.errors import ServiceError, UserError
from infra.s3_client import S3Access
from infra.s3_download import download, get
from infra.s3_errors import status_of
from infra.s3_upload import Place, abort_stale, delete, put, put_if_absent, stale, upload

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef


REACHED_IN_S = 10.0
"""How long a store may be silent when a command asks it first: more likely than an outage is an address that was mistyped."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object."""

    uri: str
    size_bytes: int
    etag: str
    modified_at: float
    """By the store's clock, in seconds since 1970."""


class ObjectStore(Protocol):
    """Whole objects under `s3://bucket/key` URIs. A missing object raises FileNotFoundError."""

    def read(self, uri: str) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def write_if_absent(self, uri: str, data: bytes) -> bool:
        """Write unless something is there; False where something was. Only where `enforces_write_if_absent` can others not come between."""
        ...

    def download(self, uri: str, path: Path) -> None: ...
    def upload(self, path: Path, uri: str) -> None: ...
    def exists(self, uri: str) -> bool: ...
    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Every object below `prefix_uri` taken as a folder, by key."""
        ...

    def folders(self, start_uri: str) -> Iterator[str]:
        """The folders whose URI begins with `start_uri` and has no further slash, by key; what they hold is not listed."""
        ...

    def delete(self, uris: Iterable[str]) -> None: ...


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` as (bucket, key). Raises UserError where it is not such a URI."""
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"{uri!r} is not an S3 address.", "Write it as s3://bucket/prefix.")
    key = uri[len("s3://") + len(parts.netloc) :].lstrip("/")
    return parts.netloc, key


def join_uri(base: str, *parts: str) -> str:
    """The URI of `parts` below `base`."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


class S3ObjectStore:
    """The object store of this process's AWS_* variables. What passes by is tried again until UNFREEZE_S3_DEADLINE_S."""

    def __init__(self, client: S3Client | None = None, *, deadline_s: float | None = None) -> None:
        self.access = S3Access(client, deadline_s)

    @property
    def client(self) -> S3Client:
        return self.access.client

    def read(self, uri: str) -> bytes:
        return get(self.access, Place(*split_uri(uri)))

    def write(self, uri: str, data: bytes) -> None:
        put(self.access, Place(*split_uri(uri)), data)

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        return put_if_absent(self.access, Place(*split_uri(uri)), data)

    def download(self, uri: str, path: Path) -> None:
        download(self.access, Place(*split_uri(uri)), path)

    def upload(self, path: Path, uri: str) -> None:
        upload(self.access, path, Place(*split_uri(uri)))

    def exists(self, uri: str) -> bool:
        bucket, key = split_uri(uri)
        try:
            self.access.ask("HeadObject", uri, lambda client: client.head_object(Bucket=bucket, Key=key))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        bucket, prefix = split_uri(prefix_uri)
        for page in self._pages(bucket, Prefix=prefix.rstrip("/") + "/" if prefix else ""):
            for item in page.get("Contents", []):
                uri, modified = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
                yield ObjectInfo(uri, item["Size"], item["ETag"].strip('"'), modified)

    def folders(self, start_uri: str) -> Iterator[str]:
        bucket, start = split_uri(start_uri)
        for page in self._pages(bucket, Prefix=start, Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield f"s3://{bucket}/{item['Prefix'].rstrip('/')}"

    def delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            delete(self.access, Place(*split_uri(uri)))

    def require_bucket(self, uri: str) -> None:
        """Raise UserError where the bucket of `uri` is missing or the credentials are refused, and soon where nobody answers at all."""
        bucket, _ = split_uri(uri)

        def ask() -> None:
            self.access.ask("HeadBucket", uri, lambda client: client.head_bucket(Bucket=bucket))

        try:
            try:
                with patience.at_most(REACHED_IN_S):
                    ask()
            except ServiceError as error:
                if not status_of(error.__cause__):
                    raise
                ask()  # it answers, but not yet with what was asked for: the address is right
        except FileNotFoundError:
            raise UserError(
                f"The bucket {bucket!r} does not exist at {self.client.meta.endpoint_url}.",
                "Create it, or name another one under `storage:` in the spec.",
            ) from None

    def stale_uploads(self, prefix_uri: str) -> Sequence[str]:
        """What was being uploaded below `prefix_uri`, and nobody carried on for a day."""
        bucket, prefix = split_uri(prefix_uri)
        return [Place(bucket, upload["Key"]).uri for upload in stale(self.access, bucket, prefix)]

    def abort_stale_uploads(self, prefix_uri: str) -> int:
        """End uploads below `prefix_uri` that nobody carried on for a day; returns how many."""
        return abort_stale(self.access, *split_uri(prefix_uri))

    def _pages(self, bucket: str, **listing: str) -> Iterator[ListObjectsV2OutputTypeDef]:
        """The pages of a listing, each asked for by itself: one that fails does not begin the whole again."""
        request: dict[str, Any] = {"Bucket": bucket, **listing}
        while True:
            page = self.access.ask("ListObjectsV2", f"s3://{bucket}/{listing['Prefix']}", lambda client: client.list_objects_v2(**request))
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]


def enforces_write_if_absent(store: ObjectStore, uri: str) -> bool:
    """Whether the store refuses the second of two conditional writes. `uri` is written once and stays: no probe disturbs another."""
    store.write_if_absent(uri, b"A probe: does this store enforce If-None-Match?\n")
    return not store.write_if_absent(uri, b"It does not.\n")


@cache
def object_store() -> S3ObjectStore:
    """This process's object store (boto3 clients are thread-safe and costly to make)."""
    return S3ObjectStore()
