"""Requests for approval: written as small objects on S3, answered by a person, on Prefect's page or at the command line.

`requests/NAME/ID.json`; the id is the digest of the content, so that a request that was altered answers to no id. Whether a request
is still open is not written anywhere: it is, until the ledger has an entry for its question, another version serves, or it expires.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from infra.errors import UserError
from infra.ledger import Content
from infra.object_store import join_uri, object_store
from ray_jobs.spec import Spec
from tasks.ledger_book import Book

ID_DIGITS = 12


def ask(book: Book, spec: Spec, verdict: dict[str, Any]) -> dict[str, Any]:
    """The open request for this verdict, written where there is none yet."""
    for request in open_requests(book):
        if request["question"] == verdict["asked"]["request"]:
            return request
    asked, at = verdict["asked"], datetime.now(UTC)
    content = {
        "question": asked["request"],
        "model": spec.name,
        "version": verdict["version"],
        "champion_version": verdict["champion_version"],
        "by": asked["by"],
        "at": at.isoformat(timespec="seconds"),
        "expires_at": (at + timedelta(hours=spec.promotion.approval_hours)).isoformat(timespec="seconds"),
        "reason": f"{asked['reason']}: {verdict['judgement']['reason']}" if asked["reason"] else verdict["judgement"]["reason"],
        "evidence_uri": verdict["evidence_uri"],
        "digests": verdict["digests"],
        "approver_differs": spec.promotion.approver_differs,
        "webhook": spec.promotion.webhook,
        "storage": book.storage,
    }
    data = _bytes(content)
    object_store().write(_uri(book, _id(data)), data)
    return {"id": _id(data), **content}


def open_requests(book: Book) -> list[dict[str, Any]]:
    """The requests that can still be answered, the oldest first; one that was altered is none."""
    return [request for request in _requests(book) if not closed(book, request)]


def unanswered(book: Book) -> list[dict[str, Any]]:
    """The requests that expired, and for no other reason cannot be answered, the oldest first."""
    return [one for one in _requests(book) if closed(book, one) and not closed(book, one, datetime.fromisoformat(one["at"]))]


def _requests(book: Book) -> list[dict[str, Any]]:
    found = []
    for info in object_store().list(_folder(book)):
        with suppress(UserError):
            found.append(_read(book, info.uri.rpartition("/")[2].removesuffix(".json")))
    return sorted(found, key=lambda request: (request["at"], request["id"]))


def read(book: Book, request_id: str) -> dict[str, Any]:
    """A request by its id. Raises UserError where there is none, or where it is not what was asked."""
    try:
        return _read(book, request_id)
    except FileNotFoundError:
        pending = ", ".join(request["id"] for request in open_requests(book)) or "none"
        raise UserError(f"There is no request {request_id!r} for {book.model}.", f"Waiting for an answer: {pending}.") from None


def _read(book: Book, request_id: str) -> dict[str, Any]:
    if not request_id.isalnum():
        raise FileNotFoundError(request_id)
    data = object_store().read(_uri(book, request_id))
    if _id(data) != request_id:
        raise UserError(
            f"The request {request_id} for {book.model} was altered after it was asked: nothing is promoted by it.",
            f"Ask again: `unfreeze promote {book.model} --version VERSION`.",
        )
    return {"id": request_id, **json.loads(data)}


def closed(book: Book, request: dict[str, Any], at: datetime | None = None) -> str | None:
    """Why a request can no longer be answered, or None where it can."""
    if entry := book.settled(request["question"]):
        return f"it was answered already: entry {entry.number} of the ledger, {entry.verdict} by {entry.approver or entry.by}"
    if book.champion != request["champion_version"]:
        return f"it is stale: version {request['version']} was judged against version {request['champion_version'] or 'none'}, and now " + (
            f"version {book.champion} serves" if book.champion else "none serves"
        )
    if (at or datetime.now(UTC)) >= datetime.fromisoformat(request["expires_at"]):
        return f"it expired at {request['expires_at']}"
    return None


def check_answer(book: Book, request: dict[str, Any], *, approve: bool, by: str) -> None:
    """Raises UserError where the request is closed, or whoever answers may not."""
    judge_again = f"`unfreeze promote {book.model} --version {request['version']}` judges it anew."
    if why := closed(book, request):
        raise UserError(
            f"The request {request['id']} for version {request['version']} of {book.model} cannot be answered: {why}.", judge_again
        )
    if approve and request["approver_differs"] and by == request["by"]:
        raise UserError(
            f"{by} asked for this promotion, and promotion.approver_differs says that another must approve it.",
            f"Let another person run `unfreeze promote {book.model} --approve {request['id']}`.",
        )


def answered(request: dict[str, Any], *, approve: bool, by: str, reason: str, at: str) -> Content:
    """The ledger's entry for an answer."""
    given = f"{'approved' if approve else 'rejected'} by {by}" + (f" ({reason})" if reason else "")
    return Content(
        at=at, by=request["by"], verdict="promoted" if approve else "rejected", from_version=request["champion_version"],
        to_version=request["version"], reason=f"{given}: {request['reason']}", evidence_uri=request["evidence_uri"], approver=by,
        digests=request["digests"],
    )  # fmt: skip


def _folder(book: Book) -> str:
    return join_uri(book.storage, "requests", book.model)


def _uri(book: Book, request_id: str) -> str:
    return join_uri(_folder(book), f"{request_id}.json")


def _bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:ID_DIGITS]
