"""The step that finds the champion to judge against: by the ledger, with its published folder checked."""

from __future__ import annotations

from typing import Any

from ray_jobs.spec import Spec
from tasks.ledger_book import follow, open_book, tell
from tasks.policies import effect
from tasks.serving import describe

NOBODY: dict[str, Any] = {"version": None, "artifact_uri": None, "trained_on": []}


@effect(name="find champion", timeout_s=300)
def find_champion(spec: Spec, request: str) -> dict[str, Any]:
    """The version to judge against, its folder, the datasets it has seen, and notes on what was put right; version None: there is none.

    `request` names the question. Where the ledger has answered it already, it is the version that was judged against then, so that a
    command that was killed after its entry was written finds the same answer again.
    """
    book = open_book(spec.name, spec.storage)
    serving, notes = follow(book)
    tell(notes)
    settled = book.settled(request)
    version = settled.from_version if settled else serving
    return {**(describe(book, version) if version else NOBODY), "notes": notes}
