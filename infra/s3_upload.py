"""One object to S3: whole where it is small, else in parts, so that an upload that was cut off carries on from the parts that arrived.

Each request carries its MD5, which a server that checks it refuses if it does not fit; the ETag of the answer is compared as well,
since others (rclone) accept what arrives. Crash order: parts in any order, then the one request that makes them an object.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from infra import usage
from infra.errors import ServiceError, UnfreezeError
from infra.in_threads import in_threads
from infra.s3_client import S3Access
from infra.s3_errors import Altered, code_of, is_refusal, passes_by, status_of
from infra.usage import Usage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef, MultipartUploadTypeDef

MIB = 2**20
WHOLE_BYTES = 16 * MIB
PART_BYTES = 8 * MIB
MOST_PARTS = 9_000
"""S3 takes 10,000."""
UNDECIDED_ATTEMPTS = 8
"""S3 answers 409 to a conditional write that met another one under way: neither won yet."""
STALE_S = 24 * 3600.0
RESTARTS = 3
PART_THREADS = 8

_parts_in_memory = BoundedSemaphore(8)


@dataclass(frozen=True)
class Place:
    """Where an object lies."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class Part:
    """One part of a file: its number from 1, where it begins, and its size."""

    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Sent:
    """A part that arrived: what the server calls it, the MD5 of what was sent, and whether the server's answer fits that."""

    etag: str
    md5: str
    is_certain: bool


class Vanished(Exception):  # noqa: N818 - its name is what happened
    """The server does not know the upload any more: it was restarted, or another process finished or ended it."""


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def md5_of(answer: Mapping[str, Any]) -> str | None:
    """The MD5 that an ETag is; None where it is something else (parts, or encryption with keys of a service)."""
    etag = str(answer.get("ETag", "")).strip('"')
    is_other = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    return etag if not is_other and re.fullmatch("[0-9a-f]{32}", etag) else None


def put(access: S3Access, place: Place, data: bytes) -> None:
    """Write a whole object in one request."""
    if access.small_put and access.small_put.send(place.bucket, place.key, data, md5(data)):
        usage.add(Usage(s3_written_bytes=len(data), s3_requests=1))
        return
    access.ask("PutObject", place.uri, lambda client: _put(client, place, data))
    usage.add(Usage(s3_written_bytes=len(data)))


def put_if_absent(access: S3Access, place: Place, data: bytes) -> bool:
    """Write an object unless something is there; False where something was."""
    answers_lost = 0

    def request(client: S3Client) -> bool:
        nonlocal answers_lost
        try:
            _put(client, place, data, IfNoneMatch="*")
        except Exception as error:
            answers_lost += passes_by(error)
            if status_of(error) != HTTPStatus.PRECONDITION_FAILED:
                raise
            # where an answer was lost, the write that it was for may be the very one that refuses this one
            return bool(answers_lost) and client.get_object(Bucket=place.bucket, Key=place.key)["Body"].read() == data
        return True

    for _ in range(UNDECIDED_ATTEMPTS):
        try:
            is_ours = access.ask("PutObject", place.uri, request)
            usage.add(Usage(s3_written_bytes=len(data) * is_ours))
            return is_ours
        except ServiceError as error:
            if status_of(error.__cause__) == HTTPStatus.NOT_IMPLEMENTED:  # as with those that ignore the condition
                put(access, place, data)
                return True
            if status_of(error.__cause__) != HTTPStatus.CONFLICT:
                raise
    raise ServiceError(f"S3 could not decide which of several writers of {place.uri} was first.", "The same command carries on.")


def delete(access: S3Access, place: Place) -> None:
    """Delete an object; one that is not there is deleted already."""
    access.ask("DeleteObject", place.uri, lambda client: client.delete_object(Bucket=place.bucket, Key=place.key))


def _put(client: S3Client, place: Place, data: bytes, **condition: Any) -> None:
    digest = md5(data)
    answer = client.put_object(Bucket=place.bucket, Key=place.key, Body=data, ContentMD5=_base64(digest), **condition)
    stored = md5_of(answer)
    if stored in (None, digest):
        return
    if client.get_object(Bucket=place.bucket, Key=place.key)["Body"].read() != data:  # an ETag may be anything, says S3
        raise Altered(f"{place.uri} was altered on its way to S3 (MD5 {digest}, stored {stored})")


def part_bytes(size_bytes: int) -> int:
    """The size of the parts of a file: depends on its size alone, so that whoever carries on cuts it alike."""
    return max(PART_BYTES, math.ceil(size_bytes / MOST_PARTS / MIB) * MIB)


def parts_of(size_bytes: int) -> list[Part]:
    step = part_bytes(size_bytes)
    return [Part(number, start, min(step, size_bytes - start)) for number, start in enumerate(range(0, size_bytes, step), 1)]


def upload(access: S3Access, path: Path, place: Place) -> None:
    """Write a file as one object."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        put(access, place, path.read_bytes())
        return
    for _ in range(RESTARTS):
        with suppress(Vanished):
            is_certain = _upload_in_parts(access, path, place, parts_of(size))
            if access.ask("HeadObject", place.uri, lambda client: _head(client, place))["ContentLength"] == size:
                if not is_certain:
                    _read_back(access, place, path)
                return
    raise ServiceError(f"S3 at {access.endpoint} lost the upload of {place.uri} {RESTARTS} times.", "The same command carries on.")


def stale(access: S3Access, bucket: str, prefix: str, *, older_than_s: float = STALE_S) -> list[MultipartUploadTypeDef]:
    """The uploads below a prefix that nobody carried on: their parts cost space, and no listing shows them."""
    return [upload for upload in _uploads(access, bucket, prefix) if _age_s(upload) > older_than_s]


def abort_stale(access: S3Access, bucket: str, prefix: str, *, older_than_s: float = STALE_S) -> int:
    """End them; returns how many."""
    return sum(_abort(access, bucket, upload) for upload in stale(access, bucket, prefix, older_than_s=older_than_s))


def _upload_in_parts(access: S3Access, path: Path, place: Place, parts: list[Part]) -> bool:
    """Send what has not arrived yet, and make it one object. Whether the ETags told that everything arrived as it was sent."""
    upload_id, arrived = _begun(access, path, place, parts)

    def send(part: Part) -> Sent:
        if part.number in arrived:
            return Sent(f'"{arrived[part.number]}"', arrived[part.number], is_certain=True)
        with _parts_in_memory:
            return _send_part(access, place, upload_id, part, _read(path, part))

    sent = list(in_threads(send, parts, PART_THREADS))
    whole = hashlib.md5(b"".join(bytes.fromhex(one.md5) for one in sent), usedforsecurity=False).hexdigest()
    _finish(access, place, upload_id, [one.etag for one in sent], expected=f"{whole}-{len(parts)}")
    return all(one.is_certain for one in sent)


def _send_part(access: S3Access, place: Place, upload_id: str, part: Part, data: bytes) -> Sent:
    """An ETag that is not the MD5 twice in the same way is the server's own kind of ETag, or of error: then it is not certain."""
    digest, odd = md5(data), set()

    def request(client: S3Client) -> Sent:
        with _vanishing():
            answer = client.upload_part(
                Bucket=place.bucket, Key=place.key, UploadId=upload_id, PartNumber=part.number, Body=data, ContentMD5=_base64(digest)
            )
        stored = md5_of(answer)
        if stored not in (None, digest) and stored not in odd:
            odd.add(stored)
            raise Altered(f"part {part.number} of {place.uri} was altered on its way to S3 (MD5 {digest}, stored {stored})")
        return Sent(answer["ETag"], digest, is_certain=stored in (None, digest))

    sent = access.ask("UploadPart", place.uri, request)
    usage.add(Usage(s3_written_bytes=len(data)))
    return sent


def _finish(access: S3Access, place: Place, upload_id: str, etags: list[str], *, expected: str) -> None:
    """Make the parts one object. Where the answer was lost, S3 knows no such upload when asked again, and the object is there."""
    parts: list[Any] = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]

    def request(client: S3Client) -> None:
        try:
            with _vanishing():
                client.complete_multipart_upload(Bucket=place.bucket, Key=place.key, UploadId=upload_id, MultipartUpload={"Parts": parts})
        except Vanished:
            try:
                is_there = _head(client, place)["ETag"].strip('"') == expected
            except Exception as error:
                if not is_refusal(error):
                    raise
                is_there = False
            if not is_there:
                raise

    access.ask("CompleteMultipartUpload", place.uri, request)


def _begun(access: S3Access, path: Path, place: Place, parts: list[Part]) -> tuple[str, dict[int, str]]:
    """The id of an upload of this very content, and the MD5 of each part of it that arrived; a new one where there is none."""
    for upload in _uploads(access, place.bucket, place.key.rpartition("/")[0]):
        if upload["Key"] != place.key:
            if _age_s(upload) > STALE_S:
                _abort(access, place.bucket, upload)
            continue
        arrived = _arrived(access, place, upload["UploadId"])
        if arrived is not None and arrived == _digests_of(path, [part for part in parts if part.number in arrived]):
            return upload["UploadId"], arrived
        _abort(access, place.bucket, upload)  # of another content; and a server may refuse to replace a part
    new = access.ask("CreateMultipartUpload", place.uri, lambda client: client.create_multipart_upload(Bucket=place.bucket, Key=place.key))
    return new["UploadId"], {}


def _digests_of(path: Path, parts: list[Part]) -> dict[int, str]:
    return {part.number: md5(_read(path, part)) for part in parts}


def _uploads(access: S3Access, bucket: str, prefix: str) -> list[MultipartUploadTypeDef]:
    """The unfinished uploads below a prefix; none where the server cannot tell, or may not: everything is then sent again."""

    def request(client: S3Client) -> list[MultipartUploadTypeDef]:
        try:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
            return [upload for page in pages for upload in page.get("Uploads", [])]
        except Exception as error:
            if not is_refusal(error):
                raise
            return []

    return access.ask("ListMultipartUploads", f"s3://{bucket}/{prefix}", request)


def _abort(access: S3Access, bucket: str, upload: MultipartUploadTypeDef) -> bool:
    """End an upload; one that cannot be ended costs space alone."""
    key, upload_id = upload["Key"], upload["UploadId"]
    with suppress(FileNotFoundError, UnfreezeError):
        uri = f"s3://{bucket}/{key}"
        access.ask("AbortMultipartUpload", uri, lambda client: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id))
        return True
    return False


def _age_s(upload: MultipartUploadTypeDef) -> float:
    return time.time() - upload["Initiated"].timestamp()


def _arrived(access: S3Access, place: Place, upload_id: str) -> dict[int, str] | None:
    """The MD5 of each part that S3 has; None where it does not tell."""

    def request(client: S3Client) -> dict[int, str] | None:
        try:
            pages = client.get_paginator("list_parts").paginate(Bucket=place.bucket, Key=place.key, UploadId=upload_id)
            return {part["PartNumber"]: md5_of(part) or "" for page in pages for part in page.get("Parts", [])}
        except Exception as error:
            if not is_refusal(error):
                raise
            return None

    return access.ask("ListParts", place.uri, request)


def _read_back(access: S3Access, place: Place, path: Path) -> None:
    """Compare the object with the file, for servers whose ETags tell nothing."""

    def request(client: S3Client) -> bool:
        body = client.get_object(Bucket=place.bucket, Key=place.key)["Body"]
        with path.open("rb") as file:
            return all(file.read(len(chunk)) == chunk for chunk in body.iter_chunks(MIB))

    if not access.ask("GetObject", place.uri, request):
        raise ServiceError(
            f"{place.uri} was altered on its way to S3 at {access.endpoint}.", "Check the network; the same command carries on."
        )


@contextmanager
def _vanishing() -> Iterator[None]:
    """An upload that the server forgot, whose parts another process replaced, or where a part cannot be replaced, is begun again."""
    try:
        yield
    except Exception as error:
        if code_of(error) in {"NoSuchUpload", "InvalidPart", "InvalidPartOrder", "NotImplemented"}:
            raise Vanished from error
        raise


def _head(client: S3Client, place: Place) -> HeadObjectOutputTypeDef:
    return client.head_object(Bucket=place.bucket, Key=place.key)


def _read(path: Path, part: Part) -> bytes:
    with path.open("rb") as file:
        file.seek(part.start)
        return file.read(part.size)


def _base64(digest: str) -> str:
    return b64encode(bytes.fromhex(digest)).decode()
