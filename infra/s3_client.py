"""The boto3 client of this process's AWS_* variables, and how it is asked: patiently, and with credentials read again when they expire."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from infra import settings, usage
from infra.patience import GaveUp, Notice, keep_trying
from infra.s3_errors import STALE_CREDENTIALS, code_of, explained, passes_by
from infra.s3_small_put import SmallPut
from infra.usage import Usage

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

CONNECTIONS = 64
CONNECT_S, READ_S = 5, 60


def new_client() -> S3Client:
    """A boto3 S3 client configured by the AWS_* variables. It asks once: `S3Access` tries again."""
    return _client_of(_new_session())


def _new_session() -> Session:
    import boto3

    return boto3.session.Session()  # the default session would keep the first credentials it saw


def _client_of(session: Session) -> S3Client:
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
        # every write carries its MD5 and is checked by the answer's ETag; further checksums many servers do not know
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", config=config)


class S3Access:
    """How S3 is asked: a client, and how long an answer is waited for."""

    def __init__(self, client: S3Client | None = None, deadline_s: float | None = None) -> None:
        self.small_put: SmallPut | None = None
        self.client = client or self._connected()
        self.deadline_s = deadline_s or settings.load().s3_deadline_s
        self.endpoint = self.client.meta.endpoint_url
        self._notice = Notice(f"S3 at {self.endpoint}")
        self._renewing = threading.Lock()

    def ask(self, operation: str, uri: str, request: Callable[[S3Client], T]) -> T:
        """What `request` returns. It may be called again and again, so it must do no harm twice.

        Raises FileNotFoundError, UserError or ServiceError; an error that `request` raises itself and S3 does not know passes through.
        """
        from botocore.exceptions import ClientError

        asked = self.client
        try:
            try:
                return self._patiently(request)
            except ClientError as error:
                if code_of(error) not in STALE_CREDENTIALS:
                    raise
                with self._renewing:  # a file, a role or a helper program may have newer ones
                    if self.client is asked:
                        self.client = self._connected()
                return self._patiently(request)
        except Exception as error:
            ours = explained(error, operation=operation, uri=uri, endpoint=self.endpoint)
            if ours is error:
                raise
            raise ours from error.__cause__ if isinstance(error, GaveUp) else error

    def _connected(self) -> S3Client:
        """A new client, and the short way for small objects beside it."""
        session = _new_session()
        client = _client_of(session)
        self.small_put = SmallPut(session, client, connections=CONNECTIONS, timeout_s=(CONNECT_S, READ_S))
        return client

    def _patiently(self, request: Callable[[S3Client], T]) -> T:
        attempts = 0

        def attempt() -> T:
            nonlocal attempts
            attempts += 1
            return request(self.client)

        try:
            return keep_trying(attempt, passes_by=passes_by, deadline_s=self.deadline_s, notice=self._notice)
        finally:
            usage.add(Usage(s3_requests=attempts, s3_retries=attempts - 1))
