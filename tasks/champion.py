"""The step that finds the champion to judge against: by the ledger, with its published folder checked."""

from __future__ import annotations

from typing import Any

from infra import registry
from infra.committed_folder import read_manifest
from infra.errors import UserError
from infra.ledger import promotion_of
from infra.object_store import object_store
from ray_jobs.spec import Spec
from tasks.ledger_book import ARTIFACT, Book, follow, open_book, tell
from tasks.lineage import read_lineage, weights_digest
from tasks.policies import effect

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
