"""What each command does: find or start the services it needs, then run a flow. Arguments in, plain values out."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from infra import committed_folder, local_stack, logs, progress, ray_cluster, reachability, settings
from infra.errors import UnfreezeError, UserError
from infra.local_stack import Stack
from infra.object_store import object_store, split_uri
from infra.settings import SERVICES
from ray_jobs.sources import open_source
from ray_jobs.spec import Spec
from ray_jobs.spec_file import load_spec
from tasks import accounts
from tasks.cron import next_times
from tasks.outcome import promotion_answer
from tasks.ray_work import in_this_process
from tasks.warming import await_warm_workers, leave_warm, warm_up

LOGS_S = 10.0
log = logging.getLogger(__name__)


def retrain(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The whole job; what `retrain --json` prints."""
    spec = _checked(path, overrides)
    with services(spec.storage, f"retrain {spec.name}"):
        from flows.retrain import retrain as flow
        from tasks.policies import keep_results

        answer: dict[str, Any] = keep_results(flow, spec)(spec)
        return answer


def search(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The search alone; what `search --json` prints."""
    spec = _checked(path, overrides)
    with services(spec.storage, f"search {spec.name}"):
        from flows.search import search as flow
        from tasks.policies import keep_results

        answer: dict[str, Any] = keep_results(flow, spec)(spec)
        return answer


def deploy(path: Path, overrides: Sequence[str], *, cron: str, timezone: str, overlap: Literal["skip", "queue"]) -> dict[str, Any]:
    """Create or change the scheduled retraining; what `deploy --json` prints."""
    strikes = next_times(cron, timezone, datetime.now(UTC))
    spec = _checked(path, overrides)
    with progress.step("Deploying"), local_stack.session(["prefect"], storage=spec.storage) as stack:
        from tasks.schedules import schedule

        deployed = schedule(spec, cron=cron, timezone=timezone, overlap=overlap)
        external = local_stack.status()["prefect"]["state"] == "external"
        worker = "external" if external else "running" if stack.stays("prefect") else "stopped"
    times = [strike.isoformat() for strike in strikes]
    return {**deployed, "cron": cron, "timezone": timezone, "overlap": overlap, "next": times, "worker": worker}


def promote(name: str, version: str | None, reason: str) -> dict[str, Any]:
    """Judge a registered version; what `promote --json` prints."""
    with services(local_stack.DEFAULT_STORAGE, f"promote {name}"):  # whoever imports Prefect before it has an address starts a server
        from flows.promote import promote as flow
        from tasks.candidate import find_candidate
        from tasks.policies import keep_results

        candidate = find_candidate(name, version)
        spec = candidate["spec"]
        settled: dict[str, Any] = keep_results(flow, spec)(spec, candidate["dataset"], candidate["model"], reason)
        return promotion_answer(name, settled)


def answer(name: str, request_id: str, *, approve: bool, reason: str) -> dict[str, Any]:
    """Approve or reject a request; the entry that `promote --json` prints."""
    with local_stack.session(["s3", "mlflow", "prefect"], storage=local_stack.DEFAULT_STORAGE):
        from tasks import answering

        settled = answering.answer(name, request_id, approve=approve, by=settings.user(), reason=reason, on_its_page=False)
        return promotion_answer(name, settled)


def rollback(name: str, to: str | None, reason: str) -> dict[str, Any]:
    """Put a former champion back; the entry that `rollback --json` prints."""
    from tasks.serving import roll_back

    if not reason.strip():
        raise UserError("A rollback needs a reason.", "Give it with --reason TEXT: it goes into the ledger.")
    with local_stack.session(["s3", "mlflow"], storage=local_stack.DEFAULT_STORAGE), progress.step("Rolling back"):
        entry = roll_back(name, to, reason, settings.user())
    return {"model": name, **entry}


def history(name: str, *, verify: bool) -> dict[str, Any]:
    """What `history --json` prints."""
    from tasks import history as ledger

    title = "Verifying" if verify else "Reading the ledger"
    with local_stack.session(["s3", "mlflow"], storage=local_stack.DEFAULT_STORAGE), progress.step(title):
        return ledger.verified_history(name) if verify else ledger.history(name)


def doctor(storage: str, *, fix: bool) -> dict[str, Any]:
    """What `doctor --json` prints."""
    with local_stack.session(["s3", "mlflow", "prefect"], storage=storage):
        from tasks import doctor as looking  # whoever imports Prefect before it has an address starts a server

        return looking.diagnose(storage, fix=fix)


def predict(model: str, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """One row a file, as soon as it is known."""
    from tasks import prediction

    files = prediction.find_files(paths)
    reference = prediction.parse_reference(model)
    with local_stack.session(["s3", "mlflow"], storage=local_stack.DEFAULT_STORAGE):
        yield from prediction.predict(reference, files)


def verify(uri: str) -> dict[str, Any]:
    """Every object of a published folder against its manifest."""
    split_uri(uri)
    with local_stack.session(["s3"], storage=local_stack.DEFAULT_STORAGE), progress.step("Verifying"):
        problems = committed_folder.verify(object_store(), uri)
        manifest = committed_folder.read_manifest(object_store(), uri)
    objects = len(manifest.objects) if manifest else 0
    rows = [{"key": problem.key, "problem": problem.what} for problem in problems]
    return {"uri": uri, "objects": objects, "verified": not problems, "problems": rows}


def cache(storage: str) -> dict[str, Any]:
    """The feature cache, on S3 and on this machine."""
    from tasks import cache as feature_cache

    with local_stack.session(["s3"], storage=storage), progress.step("Looking"):
        return feature_cache.show(storage)


def cache_prune(storage: str, *, local: bool, older_than_days: float | None, to_bytes: str | None, dry_run: bool) -> dict[str, Any]:
    """Throw cached features away; what went."""
    from tasks import cache as feature_cache

    size = None if to_bytes is None else settings.bytes_of(to_bytes)
    limits: dict[str, Any] = {"older_than_days": older_than_days, "to_bytes": size, "dry_run": dry_run}
    if local:
        return feature_cache.prune(None, **limits)
    with local_stack.session(["s3"], storage=storage), progress.step("Pruning"):
        return feature_cache.prune(storage, **limits)


def up() -> dict[str, Any]:
    """Start the embedded stack; what `status --json` prints."""
    with progress.step("Starting the embedded stack"):
        answer: dict[str, Any] = local_stack.up()
    with progress.step("Loading torch in its workers"), local_stack.session(SERVICES, storage=local_stack.DEFAULT_STORAGE) as stack:
        if answer["ray"]["state"] == "running":
            with ray_cluster.one_connection(partial(warm_up, claim=stack.claim)):
                await_warm_workers()
    return answer


def down() -> None:
    """Stop the embedded stack."""
    local_stack.down()


def status() -> dict[str, Any]:
    """What `status --json` prints."""
    answer: dict[str, Any] = local_stack.status()
    return answer


def _checked(path: Path, overrides: Sequence[str]) -> Spec:
    """The spec, with what can be checked before any server starts."""
    spec = load_spec(path, overrides)
    check_source(spec)
    return spec


def check_source(spec: Spec) -> None:
    """Raise UserError where the images are not there, or no data to learn from."""
    if not spec.data.source.startswith("s3://"):
        with open_source(spec.data, slices=spec.promotion.slices):
            pass


@contextmanager
def services(storage: str, command: str) -> Iterator[None]:
    """All four services, a log, and one connection to Ray for all steps, unless they go to a cluster as jobs. `command`: for people."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # our own progress speaks; Prefect's lines go to its server
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")  # of each request, 14 s; its five would be minutes at the end of a flow
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")  # while its server is away, kilobytes for each task
    with ExitStack() as exits:
        exits.enter_context(redirect_stdout(sys.stderr))  # Ray tells there of a worker that died; stdout is for the answer alone
        exits.enter_context(logs.to_file(settings.home_dir() / "logs" / f"command-{os.getpid()}.jsonl"))
        exits.enter_context(logs.within(command=command, pid=os.getpid()))
        exits.enter_context(_end_logged())
        with accounts.looking_for_services(), progress.step("Finding or starting the services"):
            stack = exits.enter_context(local_stack.session(SERVICES, storage=storage))
            here = settings.load()
            reachability.require_answers({"mlflow": here.external("mlflow"), "prefect": here.external("prefect")})
        _log_where_the_others_log()
        exits.callback(_send_logs)
        if in_this_process():
            warming = partial(warm_up, claim=stack.claim) if stack.stays("ray") else warm_up
            exits.enter_context(ray_cluster.one_connection(warming))
            exits.callback(_leave_warm, stack)
        from tasks.deployments import prefect_errors  # imports Prefect, which has an address now

        exits.enter_context(prefect_errors())
        yield


@contextmanager
def _end_logged() -> Iterator[None]:
    """The last line of a command's log says how it went."""
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error, exc_info=None if isinstance(error, UnfreezeError) else error)
        raise
    log.info("done")


def _log_where_the_others_log() -> None:
    """Of each service its address, and its own log where it is the stack's; Ray's workers log beside the log of its head."""
    for service, found in local_stack.status().items():
        where = {key: found[key] for key in ("state", "log", "endpoint", "uri", "api_url", "address", "dashboard_url") if found.get(key)}
        log.info("service", extra={"service": service, **where})


def _leave_warm(stack: Stack) -> None:
    """On a stack that stays up, the next command finds warm workers."""
    with suppress(UnfreezeError):
        if stack.stays("ray"):
            leave_warm(stack.claim)


def _send_logs() -> None:
    """Let Prefect's server have the last log lines and events while it still runs; one that is away is not waited for once more."""
    with suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(_sent(), LOGS_S))


async def _sent() -> None:
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    await APILogHandler.aflush()
    await EventsWorker.drain_all()  # type: ignore[misc]  # within a loop it is awaitable
