"""S3's failures: which of them pass by themselves, and what the others mean to a person."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from infra.errors import ServiceError, UnfreezeError, UserError
from infra.patience import GaveUp

PASSING_STATUSES = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
PASSING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests", "RequestTimeout",
    "InternalError", "ServiceUnavailable", "PriorRequestNotComplete",
    # what arrived at the server is not what was sent: refused by it with 400
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
STALE_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "RequestExpired",
    "InvalidToken",
    "InvalidAccessKeyId",
}
REFUSED = {"AccessDenied", "SignatureDoesNotMatch"} | STALE_CREDENTIALS


class Altered(Exception):  # noqa: N818 - its name is what happened
    """What arrived is not what was sent; sent again, it may."""


def status_of(error: BaseException | None) -> int:
    """The HTTP status with which S3 refused, 0 where it did not get so far."""
    status: int = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def code_of(error: BaseException | None) -> str:
    """S3's name for why it refused."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def passes_by(error: BaseException) -> bool:
    """Whether the same request may succeed later: throttling, 5xx, no or half an answer, and what was altered on the way."""
    from botocore.exceptions import ClientError, ConnectionError, FlexibleChecksumError, HTTPClientError, IncompleteReadError, SSLError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return status_of(error) in PASSING_STATUSES or code_of(error) in PASSING_CODES
    if isinstance(error, SSLError):
        return "CERTIFICATE" not in str(error).upper()
    # a listing cut short is no XML
    return isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, FlexibleChecksumError, Altered))


def is_refusal(error: BaseException) -> bool:
    """Whether S3 understood the request and will not serve it, however often it is asked."""
    return bool(status_of(error)) and not passes_by(error)


def explained(error: Exception, *, operation: str, uri: str, endpoint: str) -> Exception:
    """The error as ours: FileNotFoundError, UserError or ServiceError."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, (UnfreezeError, OSError)):
        return error
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return UserError(f"No S3 credentials for {uri}: {error}", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    if isinstance(error, ClientError):
        return _refused(error, operation=operation, uri=uri, endpoint=endpoint)
    if isinstance(error, GaveUp):
        tried = f"{error.attempts} attempt{'s' if error.attempts > 1 else ''} in {error.seconds:.0f} s"
        return ServiceError(f"S3 at {endpoint} did not serve {operation} of {uri}: {error.__cause__} ({tried}).", _way_out(error.__cause__))
    if isinstance(error, (BotoCoreError, Altered)):
        return ServiceError(f"S3 at {endpoint} did not serve {operation} of {uri}: {error}", _way_out(error))
    return error


def _refused(error: Exception, *, operation: str, uri: str, endpoint: str) -> Exception:
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return UserError(f"The bucket {bucket!r} does not exist.", "Create it, or name another one under `storage:` in the spec.")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return FileNotFoundError(uri)
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} or code in REFUSED:
        return UserError(
            f"S3 refused the credentials for {uri} ({code}).",
            "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and their rights on this bucket.",
        )
    return ServiceError(f"S3 at {endpoint} did not serve {operation} of {uri}: {error}", "Check the service; the same command carries on.")


def _way_out(error: BaseException | None) -> str:
    where = "the service" if status_of(error) else "AWS_ENDPOINT_URL and that the service is up"
    return f"Check {where}; the same command carries on. UNFREEZE_S3_DEADLINE_S says how long it is waited for."


def _response(error: BaseException | None) -> dict[str, Any]:
    """What S3 answered; nothing with errors of a connection."""
    return getattr(error, "response", None) or {}
