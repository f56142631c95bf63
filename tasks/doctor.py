"""What is reachable, what the store enforces, and where the ledger, MLflow and S3 disagree, each with what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from prefect.client.schemas.objects import FlowRun

from infra import local_stack, reachability, registry
from infra.committed_folder import verify as verify_folder
from infra.errors import UnfreezeError
from infra.lease import Holder
from infra.ledger import verify as verify_ledger
from infra.ledger_choice import choose, enforces_conditional_writes, open_ledger
from infra.object_store import object_store
from infra.settings import SERVICES
from tasks.approval import open_requests
from tasks.deployments import prefect_client
from tasks.ledger_book import ARTIFACT, PLACE, Book, find_storage, follow, open_book
from tasks.lineage import weights_digest
from tasks.reaper import PATIENCE_S, Watch, crash, running


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `ok`, a `note`, or `wrong` with what to do about it; `mend` does it, where a command can."""

    what: str
    state: Literal["ok", "note", "wrong"]
    words: str
    fix: str | None = None
    mend: Callable[[], object] | None = None


def findings(storage: str) -> Iterator[Finding]:
    """Everything, in order: services, the store, then each model that was ever published."""
    yield from services()
    yield _store(storage)
    yield from flow_runs()
    for name in registry.names():
        if _is_ours(name):
            yield from _model(name)


def services() -> Iterator[Finding]:
    """Each service with its address, version and latency. An embedded one that is stopped is started by whoever needs it."""
    status = local_stack.status()
    for service in SERVICES:
        row = status[service]
        where = next((row[key] for key in ("endpoint", "uri", "api_url", "address") if row.get(key)), None)
        if row["state"] == "stopped":
            yield Finding(service, "ok", "embedded, not running: commands start it when they need it")
            continue
        answer = reachability.ask(service, row)
        if answer.problem:
            fix = (
                f"Start it, or unset its variable to use the embedded one; its log: {row['log']}"
                if row["log"]
                else "Start it, or mend its address."
            )
            yield Finding(service, "wrong", f"{row['state']}, {where}: does not answer ({answer.problem})", fix)
        else:
            version = f", version {answer.version}" if answer.version else ""
            yield Finding(service, "ok", f"{row['state']}, {where}{version}, {answer.latency_ms:.0f} ms")


def _store(storage: str) -> Finding:
    enforces = enforces_conditional_writes(storage)
    choice = choose(storage)
    words = f"conditional writes are {'enforced' if enforces else 'ignored'}; the ledger is kept in {choice.where}, because {choice.why}"
    return Finding("store", "ok" if enforces or choice.database is not None else "note", words)


def flow_runs() -> Iterator[Finding]:
    """Those that Prefect takes for RUNNING, where it can be asked; what is wrong with Prefect itself was said already."""
    if local_stack.status()["prefect"]["state"] == "stopped":
        return
    with suppress(UnfreezeError), prefect_client() as client:
        for flow_run, holder in list(running(client)):
            yield _flow_run(flow_run, holder)


def _flow_run(flow_run: FlowRun, holder: Holder) -> Finding:
    what = f"flow run {flow_run.name}"
    if Watch().is_dead(holder):
        words = f"RUNNING in Prefect, but its process ({holder}) was ended"
        return Finding(what, "wrong", words, "It is set to Crashed; the next start does it by itself.", lambda: _reap(flow_run, holder))
    since = flow_run.updated.astimezone(UTC) if flow_run.updated else None
    if since is None or (datetime.now(UTC) - since).total_seconds() < PATIENCE_S:
        return Finding(what, "ok", f"at work: {holder}")
    words = f"RUNNING in Prefect: {holder}, whose last sign of life came at {since:%Y-%m-%d %H:%M:%S} UTC"
    return Finding(what, "note", words, "Flow runs that are at work watch it, and set it to Crashed after a minute without a sign.")


def _reap(flow_run: FlowRun, holder: Holder) -> None:
    with prefect_client() as client:
        crash(client, flow_run, holder)


def _is_ours(name: str) -> bool:
    newest = registry.newest(name)
    return PLACE in (registry.model_tags(name) or {}) or (newest is not None and ARTIFACT in newest.tags)


def _model(name: str) -> Iterator[Finding]:
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
    yield Finding(what, "ok", f"the ledger has {len(book.entries)} entries and verifies")
    yield _alias(book)
    if book.champion:
        yield _champion(book, book.champion)
    for request in open_requests(book):
        words = f"request {request['id']} for version {request['version']} waits for an answer until {request['expires_at']}"
        yield Finding(what, "note", words, f"`unfreeze promote {name} --approve {request['id']}` or --reject.")


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
    return Finding(what, "wrong", words, f"Let the alias name version {book.champion} again.", lambda: follow(book))


def _champion(book: Book, version: str) -> Finding:
    what, way_out = f"model {book.model}", f"Put another version back: `unfreeze rollback {book.model} --to VERSION --reason TEXT`."
    found = registry.get(book.model, version)
    uri = found.tags.get(ARTIFACT, "") if found else ""
    if not uri:
        return Finding(what, "wrong", f"the champion, version {version}, was deleted from MLflow, or has no published folder", way_out)
    try:
        problems = [f"{problem.key} is {problem.what}" for problem in verify_folder(object_store(), uri)]
        promoted = next((e for e in reversed(book.entries) if e.to_version == version and "weights" in e.digests), None)
        if promoted and not problems and weights_digest(object_store(), uri) != promoted.digests["weights"]:
            problems = ["its weights are not those that were promoted"]
    except UnfreezeError as error:
        problems = [error.what]
    if problems:
        return Finding(
            what, "wrong", f"the champion, version {version}, is not as it was published at {uri}: {'; '.join(problems)}", way_out
        )
    return Finding(what, "ok", f"the champion, version {version}, is as it was published at {uri}")


def diagnose(storage: str, *, fix: bool) -> dict[str, Any]:
    """What `doctor --json` prints: every finding; with `fix`, those that a command can mend are mended, one at a time."""
    rows = []
    for finding in findings(storage):
        row = {
            "what": finding.what,
            "state": finding.state,
            "words": finding.words,
            "fix": finding.fix,
            "fixable": finding.mend is not None,
        }
        fixed = False
        if fix and finding.mend is not None:
            finding.mend()
            fixed = True
        rows.append({**row, "fixed": fixed})
    return {"healthy": all(row["state"] != "wrong" or row["fixed"] for row in rows), "findings": rows}
