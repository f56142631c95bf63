"""The seam to S3: whole objects by URI, over boto3 configured by its own AWS_* variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from infra.errors import ServiceError, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

UNDECIDED_ATTEMPTS = 8
"""S3 answers 409 to a conditional write that met another one under way: neither won yet."""


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


def new_client() -> S3Client:
    """A boto3 S3 client with bounded retries, configured by the AWS_* variables."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 5},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)  # the default session would keep the first credentials it saw


class S3ObjectStore:
    """The object store of this process's AWS_* variables."""

    def __init__(self, client: S3Client | None = None) -> None:
        self.client = client or new_client()

    def read(self, uri: str) -> bytes:
        bucket, key = split_uri(uri)
        with _translated(uri):
            return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = split_uri(uri)
        with _translated(uri):
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        for _ in range(UNDECIDED_ATTEMPTS):
            try:
                with _translated(uri):
                    self.client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                return True
            except ServiceError as error:
                refusal = error.__cause__
                status = refusal.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(refusal, ClientError) else 0
                if status == HTTPStatus.PRECONDITION_FAILED:
                    return False
                if status == HTTPStatus.NOT_IMPLEMENTED:  # some stores refuse the condition, others ignore it: treat them alike
                    self.write(uri, data)
                    return True
                if status != HTTPStatus.CONFLICT:
                    raise
        raise ServiceError(f"S3 could not decide which of several writers of {uri} was first.", "The same command carries on.")

    def download(self, uri: str, path: Path) -> None:
        bucket, key = split_uri(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translated(uri):
            self.client.download_file(bucket, key, str(path))

    def upload(self, path: Path, uri: str) -> None:
        bucket, key = split_uri(uri)
        with _translated(uri):
            self.client.upload_file(str(path), bucket, key)

    def exists(self, uri: str) -> bool:
        bucket, key = split_uri(uri)
        try:
            with _translated(uri):
                self.client.head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        bucket, prefix = split_uri(prefix_uri)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        with _translated(prefix_uri):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    uri, modified = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
                    yield ObjectInfo(uri, item["Size"], item["ETag"].strip('"'), modified)

    def folders(self, start_uri: str) -> Iterator[str]:
        bucket, start = split_uri(start_uri)
        with _translated(start_uri):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start, Delimiter="/"):
                for item in page.get("CommonPrefixes", []):
                    yield f"s3://{bucket}/{item['Prefix'].rstrip('/')}"

    def delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            bucket, key = split_uri(uri)
            with _translated(uri):
                self.client.delete_object(Bucket=bucket, Key=key)

    def require_bucket(self, uri: str) -> None:
        """Raise UserError where the bucket of `uri` is missing or the credentials are refused."""
        bucket, _ = split_uri(uri)
        try:
            with _translated(uri):
                self.client.head_bucket(Bucket=bucket)
        except FileNotFoundError:
            raise UserError(
                f"The bucket {bucket!r} does not exist at {self.client.meta.endpoint_url}.",
                "Create it, or name another one under `storage:` in the spec.",
            ) from None


def enforces_write_if_absent(store: ObjectStore, uri: str) -> bool:
    """Whether the store refuses the second of two conditional writes. `uri` is written once and stays: no probe disturbs another."""
    store.write_if_absent(uri, b"A probe: does this store enforce If-None-Match?\n")
    return not store.write_if_absent(uri, b"It does not.\n")


@cache
def object_store() -> S3ObjectStore:
    """This process's object store (boto3 clients are thread-safe and costly to make)."""
    return S3ObjectStore()


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn botocore's errors into ours."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(f"No S3 credentials for {uri}: {error}", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.") from error
    except ClientError as error:
        raise _from_client_error(uri, error) from error
    except (BotoCoreError, S3UploadFailedError) as error:
        raise ServiceError(
            f"S3 did not serve {uri}: {error}", "Check AWS_ENDPOINT_URL and that the service is up; the same command carries on."
        ) from error


def _from_client_error(uri: str, error: Exception) -> Exception:
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        bucket, _ = split_uri(uri)
        return UserError(f"The bucket {bucket!r} does not exist.", "Create it, or name another one under `storage:` in the spec.")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return FileNotFoundError(uri)
    if status in {401, 403} or code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
        return UserError(
            f"S3 refused the credentials for {uri} ({code}).",
            "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and their rights on this bucket.",
        )
    return ServiceError(f"S3 did not serve {uri}: {error}", "Check the service; the same command carries on.")
