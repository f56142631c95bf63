"""An answer to a request for approval, carried out: the ledger's entry first, then whoever else must know of it."""

from __future__ import annotations

from typing import Any

from infra import progress
from infra.errors import UnfreezeError
from tasks import approval, approval_page
from tasks.ledger_book import open_book
from tasks.notifying import send
from tasks.promotion import answer_request


def answer(model: str, request_id: str, *, approve: bool, by: str, reason: str, on_its_page: bool) -> dict[str, Any]:
    """What was settled. `on_its_page`: it was given on Prefect's page, whose flow run ends by itself."""
    webhook = approval.read(open_book(model), request_id)["webhook"]
    entry = answer_request(model, request_id, approve=approve, by=by, reason=reason)
    settled = {"status": "promoted" if approve else "kept", "serving": open_book(model).champion, "entry": entry, "request": None}
    if not on_its_page:
        _close(request_id, entry, approved=approve)
    send(webhook, model, settled)
    return settled


def answer_on_page(storage: str, model: str, request_id: str, *, approve: bool, by: str, reason: str) -> dict[str, Any]:
    """The ledger's entry for an answer that was given on Prefect's page."""
    assert open_book(model).storage == storage, storage
    entry: dict[str, Any] = answer(model, request_id, approve=approve, by=by, reason=reason, on_its_page=True)["entry"]
    return entry


def _close(request_id: str, entry: dict[str, Any], *, approved: bool) -> None:
    words = f"{entry['verdict']} by {entry['approver']}, at the command line: entry {entry['number']} of the ledger"
    try:
        approval_page.close(request_id, words, approved=approved)
    except UnfreezeError as error:
        progress.say(f"[yellow]note:[/] the flow run that waits on Prefect's page could not be ended: {error.what} The answer stands.")
