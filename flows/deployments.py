"""What Prefect starts by its clock: a night's retraining of one spec. A worker runs it; `unfreeze deploy` puts it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import commands
from flows.retrain import retrain
from infra.errors import ServiceError, UserError
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tasks.deployments import end_as_failed
from tasks.heartbeat import with_heartbeat
from tasks.notifying import tell_of_failure
from tasks.policies import results_kept
from tasks.schedules import FLOW, stand_for_the_others

RETRIES = 3
RETRY_DELAY_S = 300
"""An int: Prefect's server refuses a fraction, and the flow run would crash."""


@flow(name=FLOW, flow_run_name="nightly {spec[name]}", retries=RETRIES, retry_delay_seconds=RETRY_DELAY_S, persist_result=False)
@with_heartbeat
def nightly(spec: dict[str, Any]) -> State[Any]:
    """Retrain by this spec; the form on Prefect's page is the spec's, and its mistakes are told in our words (so it comes as a dict)."""
    return carry_out(spec, work)


def carry_out(content: dict[str, Any], work: Callable[[Spec], dict[str, Any]]) -> State[Any]:
    """One night as the flow run's last state. A service that fails is tried again; a mistake, or a bug of ours, is not."""
    this = flow_run.get_id() or ""
    webhook = None
    try:
        stand_for_the_others(this)
        spec = parse_spec(content)
        webhook = spec.promotion.webhook
        commands.check_source(spec)
        with commands.services(spec.storage, f"nightly {spec.name}"):
            outcome = work(spec)
    except ServiceError as failure:
        if flow_run.get_run_count() > RETRIES:
            tell_of_failure(webhook, str(content.get("name")), str(failure), this)
        raise
    except Exception as problem:
        words = str(problem)
        if not isinstance(problem, UserError):
            words = f"Unexpected {type(problem).__name__}: {problem}"
            get_run_logger().exception(words)
        tell_of_failure(webhook, str(content.get("name")), words, this)
        return end_as_failed(this, words)
    return Completed(message=said(outcome))


def work(spec: Spec) -> dict[str, Any]:
    """The retraining within this flow run, not as one of its own: one page, one state, one heartbeat."""
    with results_kept(spec):
        answer: dict[str, Any] = retrain.fn(spec)
        return answer


def said(outcome: dict[str, Any]) -> str:
    """What became of a night, in a line."""
    if outcome["status"] == "skipped":
        return f"skipped: nothing changed since version {outcome['model']['version']}"
    return f"{outcome['status']}: version {outcome['model']['version']}, {outcome['decision']['reason']}"
