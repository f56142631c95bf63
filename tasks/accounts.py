"""What a run did and what it cost, step by step: gathered while it goes on, kept below `runs/` on S3 and in the home.

`runs/NAME/ID/metrics.json` and, beside it, the run's log. They are about one run, so they lie apart from what the run made: that is
named by its content, and the same whoever computed it, how long it took, and on which night.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import psutil

from infra import logs, patience, settings, usage
from infra.committed_folder import commit
from infra.errors import UnfreezeError
from infra.newest import keep_newest
from infra.object_store import join_uri, object_store
from infra.tracking import Metric
from infra.usage import Usage
from ray_jobs.spec import Spec

METRICS, LOG = "metrics.json", "log.jsonl"
KEEP_S = 5.0
"""How long a run waits at its end for a store that does not take its metrics."""
RECORDED = ("s3_read_bytes", "s3_written_bytes", "s3_retries", "cpu_s", "gpu_s")
"""What MLflow shows of a step's usage."""
log = logging.getLogger(__name__)

State = Literal["computed", "kept", "failed"]


@dataclass
class StepAccount:
    """One step: all attempts together, and the latest one alone."""

    step: str
    started_s: float
    state: State = "failed"
    seconds: float = 0.0
    attempts: int = 0
    used: Usage = field(default_factory=Usage)
    latest_s: float = 0.0
    latest: Usage = field(default_factory=Usage)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"started_s": round(self.started_s, 3), "seconds": round(self.seconds, 3)}
        return {"step": self.step, "state": self.state, **figures, "retries": max(0, self.attempts - 1), **self.used.plain()}


@dataclass
class Account:
    """One run, since its process began: times are seconds since then, by a clock that nobody sets (`began`)."""

    flow: str
    name: str
    flow_run_id: str
    began: float
    services_s: tuple[float, float]
    flow_s: float
    uri: str
    status: str = "failed"
    steps: list[StepAccount] = field(default_factory=list)

    def now_s(self) -> float:
        return time.monotonic() - self.began

    def kept(self, step: str) -> None:
        """A step whose result was there already."""
        log.info("step kept", extra={"step": step})
        self.steps.append(StepAccount(step, self.now_s(), "kept"))

    def of(self, step: str) -> StepAccount:
        """The account of an attempt that begins now: that of the attempt before, where that has failed."""
        if not self.steps or (self.steps[-1].step, self.steps[-1].state) != (step, "failed"):
            self.steps.append(StepAccount(step, self.now_s()))
        return self.steps[-1]

    def plain(self) -> dict[str, Any]:
        """The content of metrics.json: what was neither a step's work nor a kept result is what the orchestration took."""
        total_s, in_steps_s = self.now_s(), sum(step.seconds for step in self.steps)
        started_s, ready_s = self.services_s
        before_steps = {"start": started_s, "services": ready_s - started_s, "flow": self.flow_s - ready_s}
        parts = {**before_steps, "between_steps": total_s - in_steps_s - self.flow_s}
        return {
            "flow": self.flow,
            "name": self.name,
            "flow_run_id": self.flow_run_id,
            "status": self.status,
            "user": settings.user(),
            "began_at": datetime.fromtimestamp(time.time() - total_s, UTC).isoformat(timespec="milliseconds"),
            "seconds": round(total_s, 3),
            "in_steps_s": round(in_steps_s, 3),
            "orchestration": {
                "seconds": round(total_s - in_steps_s, 3),
                "share": round((total_s - in_steps_s) / max(total_s, 1e-9), 4),
                **{f"{part}_s": round(seconds, 3) for part, seconds in parts.items()},
                "own_cpu_s": round(time.process_time(), 3),
            },
            "used": usage.so_far().plain(),
            "steps": [step.plain() for step in self.steps],
        }


class _Command:
    """When this process's services were asked for, and when they were there; and whether it has had a run before."""

    services_at: tuple[float, float] | None = None
    is_first = True


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def looking_for_services() -> Iterator[None]:
    """Note how long they take."""
    started = time.monotonic()
    yield
    _Command.services_at = started, time.monotonic()


FlowFunction = TypeVar("FlowFunction", bound=Callable[..., dict[str, Any]])


def with_account(function: FlowFunction) -> FlowFunction:
    """Account for a flow's runs: between `@flow(...)` and `def`, below the heartbeat. Outside a flow run it is the plain function."""

    @functools.wraps(function)
    def accounted(spec: Spec, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from prefect.runtime import flow_run  # only now: whoever imports Prefect before it has an address starts a server

        run_id = flow_run.get_id()
        if run_id is None or _account.get() is not None:
            return function(spec, *args, **kwargs)
        with of_run(function.__name__, spec, run_id) as account:
            answer = function(spec, *args, **kwargs)
            account.status = answer.get("status", "completed")
        return {**answer, "metrics": join_uri(account.uri, METRICS)}

    # Prefect reads annotations by the globals of what it is given, which here are this module's
    accounted.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return cast(FlowFunction, accounted)


@contextmanager
def of_run(flow: str, spec: Spec, flow_run_id: str) -> Iterator[Account]:
    """Account for a run; on its end, also on a bad one, its metrics and log are kept."""
    account = _begun(flow, spec, flow_run_id)
    if current := logs.current():
        current.name_after(flow_run_id)
    token = _account.set(account)
    with logs.within(flow_run_id=flow_run_id):
        log.info("%s of %s begins", flow, spec.name)
        try:
            yield account
        finally:
            _account.reset(token)
            _keep(account)


def _begun(flow: str, spec: Spec, flow_run_id: str) -> Account:
    """It began with its process, or, where that has had another run before, with its services."""
    now, uri = time.monotonic(), join_uri(spec.storage, "runs", spec.name, flow_run_id)
    asked, ready = _Command.services_at or (now, now)
    age_s = time.time() - psutil.Process(os.getpid()).create_time()
    began = now - age_s if _Command.is_first else asked
    _Command.is_first = False
    return Account(flow, spec.name, flow_run_id, began, (asked - began, ready - began), now - began, uri)


@contextmanager
def of_step(step: str) -> Iterator[StepAccount]:
    """Account for one attempt of a step."""
    run, started, before = _account.get(), time.monotonic(), usage.so_far()
    account = run.of(step) if run else StepAccount(step, 0.0)
    account.attempts += 1
    account.state = "failed"
    with logs.within(step=step):
        log.info("step begins", extra={"attempt": account.attempts})
        try:
            yield account
            account.state = "computed"
        except BaseException as error:
            log.warning("step failed: %s", error, extra={"error": type(error).__name__})
            raise
        finally:
            account.latest_s, account.latest = time.monotonic() - started, usage.so_far() - before
            account.seconds += account.latest_s
            account.used += account.latest
            log.info("step ends", extra={"state": account.state, "seconds": round(account.latest_s, 3), **account.latest.plain()})


def kept(step: str) -> None:
    """Note that a step's result was there already."""
    if run := _account.get():
        run.kept(step)


def metrics_of(result: Mapping[str, Any]) -> list[Metric]:
    """What MLflow shows of what a step used; nothing where its result was made before this was counted."""
    used = result.get("used", {})
    return [Metric(name, float(used[name])) for name in RECORDED if name in used]


def _keep(account: Account) -> None:
    """In the home, where the last year's nights stay, and on S3 if it takes them: a run does not fail for its metrics."""
    content = account.plain()
    data = json.dumps(content, indent=1).encode()
    log.info("%s of %s: %s", account.flow, account.name, account.status, extra={"run_s": content["seconds"]} | content["orchestration"])
    try:
        folder = settings.home_dir() / "runs"
        folder.mkdir(exist_ok=True)
        (folder / f"{account.flow_run_id}.json").write_bytes(data)
        keep_newest(folder, "*.json")
        files: dict[str, Path | bytes] = {METRICS: data}
        if current := logs.current():
            files[LOG] = current.path.read_bytes()
        with patience.at_most(KEEP_S):
            commit(object_store(), account.uri, files)
    except (UnfreezeError, OSError) as error:
        log.warning("the metrics of this run were not kept on S3: %s", error)
