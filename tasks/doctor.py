"""What is reachable, what is configured, what the store enforces, and where Prefect, Ray, MLflow, S3 and the ledger disagree.

Each finding is a value with its fix (`tasks/finding.py`). What disagrees is found by doctor_work.py (flow runs, MLflow's runs, Ray
jobs), doctor_models.py (ledger, alias, champion, requests) and doctor_storage.py (what killed processes left on S3). Contract:
nothing that somebody may still be using is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infra import local_stack, progress, reachability, registry, settings
from infra.ledger_choice import choose, enforces_conditional_writes
from infra.settings import SERVICES
from tasks import doctor_models, doctor_storage, doctor_work
from tasks.finding import Finding, mend_all, plain


def diagnose(storage: str, *, fix: bool) -> dict[str, Any]:
    """What `doctor --json` prints: every finding; with `fix`, those that a command can mend are said, then mended one at a time."""
    with progress.step("Looking at everything"):
        found = list(findings(storage))
    rows = mend_all(found) if fix else [plain(finding) for finding in found]
    return {"healthy": all(row["state"] != "wrong" or row["fixed"] for row in rows), "findings": rows}


def findings(storage: str) -> Iterator[Finding]:
    """Everything, in order: services, settings and the store, then the work, each model that was ever published, and what lies on S3."""
    yield from services()
    yield Finding("settings", "ok", "; ".join(settings.set_here()) or "no UNFREEZE_ variable is set")
    yield _store(storage)
    yield from doctor_work.flow_runs()
    yield from doctor_work.mlflow_runs()
    yield from doctor_work.ray_jobs()
    for name in registry.names():
        if doctor_models.is_ours(name):
            yield from doctor_models.model(name)
    yield from doctor_models.pages()
    yield from doctor_storage.left_behind(storage)


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
