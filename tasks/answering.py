"""An answer to a request for approval, carried out: the ledger's entry first, then whoever else must know of it."""

from __future__ import annotations

from typing import Any

from infra import progress, registry
from infra.committed_folder import verify
from infra.errors import UnfreezeError, UserError
from infra.object_store import object_store
from tasks import approval, approval_page, stale_pages
from tasks.ledger_book import ARTIFACT, append, follow, now, open_book, plain_entry, tell
from tasks.lineage import manifest_digest, weights_digest
from tasks.notifying import send
from tasks.serving import check_published


def answer(model: str, request_id: str, *, approve: bool, by: str, reason: str, on_its_page: bool) -> dict[str, Any]:
    """What was settled. `on_its_page`: it was given on Prefect's page, whose flow run ends by itself."""
    webhook = approval.read(open_book(model), request_id)["webhook"]
    entry = answer_request(model, request_id, approve=approve, by=by, reason=reason)
    settled = {"status": "promoted" if approve else "kept", "serving": open_book(model).champion, "entry": entry, "request": None}
    if not on_its_page:
        _close(request_id, entry, approved=approve)
    stale_pages.end_all(model)
    send(webhook, model, settled)
    return settled


def answer_request(name: str, request_id: str, *, approve: bool, by: str, reason: str) -> dict[str, Any]:
    """Promote what was asked for, or reject it; the entry. The same answer again changes nothing.

    Raises UserError where the request is closed, or its model cannot serve.
    """
    book = open_book(name)
    tell(follow(book)[1])
    while True:
        request = approval.read(book, request_id)
        if (given := book.settled(request["question"])) and (given.verdict == "promoted", given.approver) == (approve, by):
            return plain_entry(given)
        approval.check_answer(book, request, approve=approve, by=by)
        if approve:
            _check_request(request, name)
        entry = append(book, approval.answered(request, approve=approve, by=by, reason=reason, at=now()))
        book = book.read_again()
        if entry is not None:
            follow(book)
            return plain_entry(entry)


def _check_request(request: dict[str, Any], name: str) -> None:
    """What is promoted is what was judged: weights and evidence are unchanged."""
    version = registry.get(name, request["version"])
    if version is None:
        raise UserError(f"Version {request['version']} of {name} was deleted from MLflow.", "Retrain, or promote another version.")
    uri, what = version.tags.get(ARTIFACT, ""), f"Version {request['version']} of {name}"
    check_published(uri, what)
    store = object_store()
    same = {
        "weights": weights_digest(store, uri) == request["digests"]["weights"],
        "evidence": not verify(store, request["evidence_uri"])
        and manifest_digest(store, request["evidence_uri"]) == request["digests"]["evidence"],
    }
    altered = [name for name, is_same in same.items() if not is_same]
    if altered:
        raise UserError(
            f"{what} cannot serve: its {' and '.join(altered)} changed after it was judged.",
            f"`unfreeze promote {name} --version {request['version']}` judges it anew.",
        )


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
