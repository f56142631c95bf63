"""The step that carries a verdict out: an entry in the ledger, which is the commit, or a request for approval; then the alias follows.

Crash order: published folder, evidence, ledger entry, alias. A command that was killed in between finds its own entry again by the
question that it answers; an alias that is behind is put right by whichever command comes next.
"""

from __future__ import annotations

from typing import Any

from infra import progress, registry
from infra.ledger import Content, Entry, serving_since
from ray_jobs.spec import Spec
from tasks import approval
from tasks.ledger_book import append, follow, now, open_book, plain_entry
from tasks.policies import effect


@effect(name="promote", timeout_s=600)
def settle(spec: Spec, verdict: dict[str, Any]) -> dict[str, Any] | None:
    """Commit a verdict; None where another version serves by now, so that the challenger must be judged again.

    Returns its "status", the "entry" in the ledger or the "request" for approval (each None where there is none), and who is "serving".
    """
    book, asked = open_book(spec.name, spec.storage), verdict["asked"]
    entry, request = book.settled(asked["request"]), None
    registry.set_alias(spec.name, registry.CHALLENGER, verdict["version"])
    if entry is None and not verdict["is_champion"]:
        if follow(book)[0] != verdict["champion_version"]:
            progress.say(f"Another version of {spec.name} became champion meanwhile: judging again.")
            return None
        if verdict["status"] == "awaiting_approval":
            request = approval.ask(book, spec, verdict)
        elif (entry := append(book, _content(verdict))) is None:
            progress.say(f"Another version of {spec.name} became champion meanwhile: judging again.")
            return None
    status = _status_of(entry) if entry else verdict["status"]
    serving, _ = follow(book := book.read_again())
    if verdict["is_champion"]:
        entry = serving_since(book.entries)
        progress.say(f"Version {verdict['version']} of {spec.name} serves already: nothing was decided.")
    return {"status": status, "entry": plain_entry(entry) if entry else None, "request": request, "serving": serving}


def _status_of(entry: Entry) -> str:
    return "promoted" if entry.verdict == "promoted" else "kept"


def _content(verdict: dict[str, Any]) -> Content:
    asked, judgement = verdict["asked"], verdict["judgement"]
    return Content(
        at=now(), by=asked["by"], verdict=judgement["status"], from_version=verdict["champion_version"], to_version=verdict["version"],
        reason=words(asked["reason"], judgement["reason"]), evidence_uri=verdict["evidence_uri"], digests=verdict["digests"],
    )  # fmt: skip


def words(given: str, found: str) -> str:
    """A reason that a person gave, before what was found."""
    return f"{given}: {found}" if given else found
