"""The steps that carry a verdict out: an entry in the ledger, which is the commit, or a request for approval; then the alias follows.

Crash order: published folder, evidence, ledger entry, alias. A command that was killed in between finds its own entry again by the
question that it answers; an alias that is behind is put right by whichever command comes next.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from infra import progress, registry
from infra.committed_folder import verify
from infra.errors import UserError
from infra.ledger import Content, Entry, former_champions, promotion_of, serving_since
from infra.object_store import object_store
from ray_jobs.spec import Spec
from tasks import approval
from tasks.champion import describe
from tasks.ledger_book import ARTIFACT, Book, append, follow, open_book, plain_entry, tell
from tasks.lineage import manifest_digest, weights_digest
from tasks.policies import effect


def now() -> str:
    """This moment, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def check_published(uri: str, what: str) -> None:
    """Nothing unverified serves. Raises UserError naming each object that is not as it was published."""
    problems = verify(object_store(), uri)
    if problems:
        listed = ", ".join(f"{problem.key} is {problem.what}" for problem in problems[:5])
        raise UserError(
            f"{what} cannot serve: what lies at {uri} is not what was published ({listed}).",
            f"`unfreeze verify {uri}` lists all of it; publish it again by the `unfreeze retrain` that made it, or name another version.",
        )


def answer_request(name: str, request_id: str, *, approve: bool, by: str, reason: str) -> dict[str, Any]:
    """Promote what was asked for, or reject it; the entry. Raises UserError where the request is closed, or its model cannot serve."""
    book = open_book(name)
    tell(follow(book)[1])
    while True:
        request = approval.read(book, request_id)
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


def roll_back(name: str, to: str | None, reason: str, by: str) -> dict[str, Any]:
    """Put a former champion back, by default the last one; the entry. Raises UserError where it cannot serve."""
    book = open_book(name)
    serving, notes = follow(book)
    tell(notes)
    version = _chosen(book, serving, to)
    found = describe(book, version)
    check_published(found["artifact_uri"], f"Version {version} of {name}")
    before = promotion_of(book.entries, version)
    content = Content(
        at=now(), by=by, verdict="rolled_back", from_version=serving, to_version=version, reason=reason,
        evidence_uri=before.evidence_uri if before else "", digests=before.digests | {"request": ""} if before else {},
    )  # fmt: skip
    entry = append(book, content)
    if entry is None:
        raise UserError(
            f"Another version of {name} became champion meanwhile: nothing was rolled back.",
            f"`unfreeze history {name}` shows it; run the same command again if it still is what you want.",
        )
    follow(book.read_again())
    return plain_entry(entry)


def _chosen(book: Book, serving: str | None, to: str | None) -> str:
    former = former_champions(book.entries)
    listed = f"Former champions: {', '.join(former)}." if former else "There is none to put back yet."
    if to is not None and to == serving:
        raise UserError(f"Version {to} of {book.model} serves already.", listed)
    if to is not None and to not in former:
        raise UserError(
            f"Version {to} of {book.model} was never champion.", f"{listed} `unfreeze promote {book.model} --version {to}` judges it."
        )
    if not former:
        raise UserError(f"{book.model} has no former champion to put back.", f"`unfreeze history {book.model}` shows who has served.")
    return to or former[0]
