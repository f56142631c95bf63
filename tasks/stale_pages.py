"""Flow runs that wait on Prefect's page for an answer that cannot be given any more: found, and ended.

A request goes stale where nobody touches its page: another version is promoted, a rollback is made, its answer came from elsewhere
while Prefect was away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from infra import progress
from infra.errors import UnfreezeError, UserError
from tasks import approval, approval_page
from tasks.approval_page import Waiting
from tasks.ledger_book import Book, open_book


def found(model: str | None = None) -> Iterator[tuple[Waiting, str]]:
    """The pages that wait in vain, of one model or all, and why."""
    book_of = functools.cache(open_book)  # each ledger is read once
    for page in approval_page.waiting(model):
        if why := _stale(book_of, page):
            yield page, why


def end(page: Waiting) -> bool:
    """End one that still waits in vain; False where it does not any more."""
    why = _stale(open_book, page)
    return why is not None and approval_page.close(page.request_id, why, approved=False)


def end_all(model: str) -> None:
    """End those of a model whose ledger has just changed. One that cannot be ended is found by `unfreeze doctor`, so this never fails."""
    try:
        for page, _ in found(model):
            end(page)
    except UnfreezeError as error:
        progress.say(f"[yellow]note:[/] the pages of older requests could not be ended: {error.what} `unfreeze doctor --fix` does it.")


def _stale(book_of: Callable[[str], Book], page: Waiting) -> str | None:
    """Why nobody can answer there; None where somebody can, or where it cannot be told."""
    try:
        book = book_of(page.model)
        return approval.closed(book, approval.read(book, page.request_id)) if book.storage == page.storage else None
    except UserError:  # no such model or request here: it may be another MLflow's
        return None
