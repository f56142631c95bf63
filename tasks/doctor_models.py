"""Where the ledger, MLflow's registry, S3 and Prefect's pages disagree on one model, each with what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from infra import local_stack, registry
from infra.errors import UnfreezeError
from infra.ledger import promotion_of
from infra.ledger import verify as verify_ledger
from infra.ledger_choice import open_ledger
from tasks import stale_pages
from tasks.approval import open_requests, unanswered
from tasks.approval_page import Waiting
from tasks.finding import Finding
from tasks.ledger_book import ARTIFACT, PLACE, Book, find_storage, follow, open_book
from tasks.serving import GONE, alterations


def is_ours(name: str) -> bool:
    """Whether a registered model has versions of ours."""
    newest = registry.newest(name)
    return PLACE in (registry.model_tags(name) or {}) or (newest is not None and ARTIFACT in newest.tags)


def model(name: str) -> Iterator[Finding]:
    """Its ledger, the alias, the champion's published folder, and the requests for approval."""
    what = f"model {name}"
    kept = open_ledger(find_storage(name)).kept(name)
    problems = verify_ledger(kept.entries, kept.copies)
    if problems:
        listed = "; ".join(map(str, problems))
        yield Finding(
            what, "wrong", f"the ledger is damaged: {listed}", "Put it back from the copies or a backup; nothing is promoted by it."
        )
        return
    book = open_book(name)
    yield Finding(what, "ok", f"the ledger verifies; entries: {len(book.entries)}")
    yield _alias(book)
    if book.champion:
        yield _champion(book, book.champion)
    yield from _requests(book)


def pages() -> Iterator[Finding]:
    """Flow runs that wait on Prefect's page for an answer that nobody can give any more."""
    if local_stack.status()["prefect"]["state"] == "stopped":
        return
    waiting: list[tuple[Waiting, str]] = []
    with suppress(UnfreezeError):  # what is wrong with Prefect was said already
        waiting = list(stale_pages.found())
    for page, why in waiting:
        words = f"it waits on Prefect's page for an answer to the request {page.request_id}, but {why}"
        yield Finding(f"flow run {page.name}", "wrong", words, "It is ended: the ledger stays as it is.", partial(_end_page, page))


def _end_page(page: Waiting) -> str:
    return "ended" if stale_pages.end(page) else "it can be answered again, or has ended by itself: left alone"


def _alias(book: Book) -> Finding:
    what, named = f"model {book.model}", registry.champion(book.model)
    version = named.version if named else None
    if version == book.champion:
        return Finding(
            what, "ok", f"the alias champion names version {version}, as the ledger says" if version else "no version serves yet"
        )
    words = f"the alias champion names version {version or 'none'}, but the ledger version {book.champion or 'none'}"
    if not book.entries:
        return Finding(what, "note", f"{words}: it was set by hand, and nothing is judged against it")
    return Finding(what, "wrong", words, f"Let the alias name version {book.champion} again.", lambda: _follow(book))


def _follow(book: Book) -> str:
    serving, _ = follow(book.read_again())
    return f"the alias champion names version {serving}"


def _champion(book: Book, version: str) -> Finding:
    what, way_out = f"model {book.model}", f"Put another version back: `unfreeze rollback {book.model} --to VERSION --reason TEXT`."
    promoted = promotion_of(book.entries, version)
    problems = alterations(book.model, version, promoted.digests.get("weights") if promoted else None)
    if problems:
        words = GONE if problems == [GONE] else f"is not as it was promoted: {'; '.join(problems)}"
        return Finding(what, "wrong", f"the champion, version {version}, {words}", way_out)
    return Finding(what, "ok", f"the champion, version {version}, is as it was published")


def _requests(book: Book) -> Iterator[Finding]:
    what = f"model {book.model}"
    for request in open_requests(book):
        words = f"request {request['id']} for version {request['version']} waits for an answer until {request['expires_at']}"
        yield Finding(what, "note", words, f"`unfreeze promote {book.model} --approve {request['id']}` or --reject.")
    for request in unanswered(book):
        words = f"nobody answered request {request['id']} for version {request['version']}: it expired at {request['expires_at']}"
        yield Finding(what, "note", words, f"`unfreeze promote {book.model} --version {request['version']}` judges it anew.")
