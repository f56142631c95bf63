"""What the ledger of a model tells, and whether everything that it stands for is still what it was."""

from __future__ import annotations

import json
from typing import Any

from infra.committed_folder import verify as verify_folder
from infra.errors import UserError
from infra.ledger import SERVING, Entry, champion_of, readable, verify
from infra.ledger_choice import open_ledger
from infra.object_store import ObjectStore, object_store
from tasks.approval import open_requests
from tasks.ledger_book import find_storage, open_book, plain_entry
from tasks.lineage import JUDGEMENT, manifest_digest
from tasks.serving import GONE, alterations


def history(name: str) -> dict[str, Any]:
    """Every entry, who serves, and which requests wait for an answer. A damaged ledger is shown as far as it can be read."""
    kept = open_ledger(find_storage(name)).kept(name)
    findings = verify(kept.entries, kept.copies)
    entries = [plain_entry(entry) for entry in readable(kept.entries)]
    waiting = [] if findings else open_requests(open_book(name))
    return {
        "model": name,
        "verified": False if findings else None,
        "entries": entries,
        "problems": [str(one) for one in findings],
        "requests": waiting,
    }


def verified_history(name: str) -> dict[str, Any]:
    """The history, with the chain, all evidence and the weights of every version that has served looked at byte by byte."""
    found, store = history(name), object_store()
    entries = readable(open_ledger(find_storage(name)).kept(name).entries)
    problems = [*found["problems"]]
    for entry in entries:
        problems += [f"entry {entry.number}: {what}" for what in _evidence_problems(store, entry)]
    problems += _weights_problems(name, entries)
    return found | {"verified": not problems, "problems": problems}


def _evidence_problems(store: ObjectStore, entry: Entry) -> list[str]:
    """What is not as it was judged, in the evidence and in the evaluation that it rests on."""
    wanted = entry.digests.get("evidence")
    if not wanted or not entry.evidence_uri:
        return []
    problems = _folder_problems(store, entry.evidence_uri, wanted, "evidence")
    if not problems:
        evaluation = json.loads(store.read(f"{entry.evidence_uri}/{JUDGEMENT}"))["evaluation"]
        problems = _folder_problems(store, evaluation["uri"], evaluation["digest"], "evaluation")
    return problems


def _folder_problems(store: ObjectStore, uri: str, wanted: str, what: str) -> list[str]:
    try:
        found = [f"{what} altered: {problem.key} at {uri} is {problem.what}" for problem in verify_folder(store, uri)]
        return found or ([] if manifest_digest(store, uri) == wanted else [f"{what} altered: the manifest at {uri} is another one"])
    except (UserError, FileNotFoundError):
        return [f"{what} missing: nothing lies at {uri}"]


def _weights_problems(name: str, entries: list[Entry]) -> list[str]:
    problems = []
    served = {entry.to_version: entry.digests["weights"] for entry in entries if entry.verdict in SERVING and "weights" in entry.digests}
    for version, wanted in served.items():
        found = alterations(name, version, wanted)
        if found == [GONE] and version != champion_of(entries):  # of a former one it is tidying up
            continue
        problems += [f"version {version}{' serves, but' if what == GONE else ':'} {what}" for what in found]
    return problems
