"""The seam to a team's webhook: one decision as signed JSON, tried again for a while; what becomes of it is told, never raised.

    X-Unfreeze-Timestamp   seconds since 1970 at the sending
    X-Unfreeze-Signature   sha256=HMAC-SHA256(secret, timestamp + "." + body), in hex; only where there is a secret
    X-Unfreeze-Delivery    the digest of the decision: the same in every attempt, so that a receiver knows a second delivery

A receiver computes the signature over the bytes as they came, compares in constant time, and refuses an old timestamp.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import RetryError, Retrying, retry_if_result, stop_after_attempt, stop_before_delay, wait_exponential


@dataclass(frozen=True)
class Patience:
    """How a delivery is tried, in seconds."""

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 8.0
    answer_s: float = 5.0
    """To connect, and again to answer."""
    deadline_s: float = 30.0


@dataclass(frozen=True)
class _Failure:
    why: str
    again: bool


def notify(
    url: str, body: Mapping[str, Any], secret: str | None, *, patience: Patience | None = None, clock: Callable[[], float] = time.time
) -> str | None:
    """Deliver `body`. None once the receiver has answered 2xx; else why it has not, in words without the secret or the URL's path."""
    limits = patience or Patience()
    content = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    delivery = str(body.get("digest") or hashlib.sha256(content).hexdigest())
    tries = Retrying(
        retry=retry_if_result(lambda failure: failure is not None and failure.again),
        stop=stop_after_attempt(limits.attempts) | stop_before_delay(limits.deadline_s),
        wait=wait_exponential(multiplier=limits.first_wait_s, max=limits.longest_wait_s),
    )
    try:
        failure = tries(_send, url, content, _headers(content, secret, delivery, clock), limits)
    except RetryError as given_up:
        failure = given_up.last_attempt.result()
    if failure is None:
        return None
    count = int(tries.statistics["attempt_number"])
    return f"The webhook at {_host(url)} {failure.why}" + (f" (tried {count} times)." if count > 1 else ".")


def signature(secret: str, timestamp: str, content: bytes) -> str:
    """What X-Unfreeze-Signature must be."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + content, hashlib.sha256).hexdigest()


def _headers(content: bytes, secret: str | None, delivery: str, clock: Callable[[], float]) -> Callable[[], dict[str, str]]:
    """Made anew for each attempt: a receiver may refuse an old timestamp."""

    def headers() -> dict[str, str]:
        timestamp = str(int(clock()))
        signed = {"X-Unfreeze-Signature": signature(secret, timestamp, content)} if secret else {}
        known = {"Content-Type": "application/json", "User-Agent": "unfreeze"}
        return known | {"X-Unfreeze-Timestamp": timestamp, "X-Unfreeze-Delivery": delivery} | signed

    return headers


def _send(url: str, content: bytes, headers: Callable[[], dict[str, str]], patience: Patience) -> _Failure | None:
    """One attempt. The answer's body is nobody's business, and is not read: it may be endless."""
    try:
        with httpx.stream("POST", url, content=content, headers=headers(), timeout=patience.answer_s, follow_redirects=False) as answer:
            return _judged(answer.status_code)
    except httpx.TimeoutException:
        return _Failure(f"does not answer within {patience.answer_s:g} s", again=True)
    except httpx.TransportError as error:
        return _Failure(f"cannot be reached ({type(error).__name__})", again=not isinstance(error, httpx.UnsupportedProtocol))
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return _Failure("has an address that is none", again=False)


def _judged(status: int) -> _Failure | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return _Failure(f"answers {status}, and redirects are not followed", again=False)
    known = f" ({HTTPStatus(status).phrase})" if status in HTTPStatus._value2member_map_ else ""
    return _Failure(f"answers {status}{known}", again=status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500)


def _host(url: str) -> str:
    """Of the URL what may be shown: its path is often a secret."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "no host"
    except ValueError:
        return "no host"
