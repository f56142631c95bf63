"""What may serve: a version whose published folder is what was promoted; and putting a former champion back. Needs S3 and MLflow alone."""

from __future__ import annotations

from typing import Any

from infra import registry
from infra.committed_folder import read_manifest, verify
from infra.errors import UnfreezeError, UserError
from infra.ledger import Content, former_champions, promotion_of
from infra.object_store import object_store
from tasks.ledger_book import ARTIFACT, Book, append, follow, now, open_book, plain_entry
from tasks.lineage import read_lineage, weights_digest
from tasks.notifying import send


def describe(book: Book, version: str) -> dict[str, Any]:
    """A version that has served: where it lies, and what it was trained on. Raises UserError where its folder is not what was promoted."""
    found = registry.get(book.model, version)
    way_out = f"Put another one back: `unfreeze rollback {book.model} --to VERSION --reason TEXT`."
    if found is None:
        raise UserError(f"The champion, version {version} of {book.model}, was deleted from MLflow.", way_out)
    uri, store = found.tags.get(ARTIFACT, ""), object_store()
    if not uri or read_manifest(store, uri) is None:
        raise UserError(
            f"The champion, version {version} of {book.model}, has no published model folder ({uri or 'no tag names it'}).",
            f"It cannot be judged against. {way_out}",
        )
    entry = promotion_of(book.entries, version)
    if entry and entry.digests.get("weights", "") != (now := weights_digest(store, uri)):
        raise UserError(
            f"The weights at {uri} are not those that were promoted as version {version} (sha256 {now[:12]}, in the ledger "
            f"{entry.digests.get('weights', 'none')[:12]}).",
            f"Nothing is judged against them. {way_out}",
        )
    lineage = read_lineage(store, uri)
    return {"version": version, "artifact_uri": uri, "trained_on": lineage["trained_on"] if lineage else _own_data(uri, found)}


def _own_data(uri: str, found: registry.ModelVersion) -> list[str]:
    """Of a version from before lineages were kept: the dataset that its tag names."""
    storage = uri.removesuffix(f"/models/{found.name}/{found.version}")
    data = found.tags.get("unfreeze.dataset_version")
    return [f"{storage}/datasets/{found.name}/{data}"] if data else []


def check_published(uri: str, what: str) -> None:
    """Nothing unverified serves. Raises UserError naming each object that is not as it was published."""
    problems = verify(object_store(), uri)
    if problems:
        listed = ", ".join(f"{problem.key} is {problem.what}" for problem in problems[:5])
        raise UserError(
            f"{what} cannot serve: what lies at {uri} is not what was published ({listed}).",
            f"`unfreeze verify {uri}` lists all of it; publish it again by the `unfreeze retrain` that made it, or name another version.",
        )


GONE = "was deleted from MLflow, or has no published folder"


def alterations(model: str, version: str, weights: str | None) -> list[str]:
    """What of a version is not as it was promoted, every byte looked at; `weights`: their sha256 in the ledger, where it has one.

    [GONE] where there is nothing to look at.
    """
    found, store = registry.get(model, version), object_store()
    uri = found.tags.get(ARTIFACT, "") if found else ""
    if not uri:
        return [GONE]
    try:
        problems = [f"{problem.key} at {uri} is {problem.what}" for problem in verify(store, uri)]
        if weights is not None and weights_digest(store, uri) != weights:
            problems.append(f"the weights at {uri} are not those that were promoted")
    except UnfreezeError as error:
        return [error.what]
    return problems


def roll_back(name: str, to: str | None, reason: str, by: str) -> dict[str, Any]:
    """Put a former champion back, by default the last one; the entry. Raises UserError where it cannot serve."""
    book = open_book(name)
    serving = book.champion  # the alias is put right afterwards: it cannot be while the champion is deleted from MLflow
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
    serving, _ = follow(book.read_again())
    settled = {"status": "rolled_back", "serving": serving, "entry": plain_entry(entry), "request": None}
    lineage = read_lineage(object_store(), found["artifact_uri"])
    send(lineage["spec"]["promotion"].get("webhook") if lineage else None, name, settled)
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
