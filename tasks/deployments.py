"""The seam to Prefect's deployments: what Prefect can start by itself, and the one work pool whose worker carries it out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, State, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.states import Failed, Scheduled
from prefect.workers.process import ProcessWorker

from infra.addresses import shown
from infra.errors import ServiceError

POOL = "unfreeze"
"""A team's own workers take from it too: `prefect worker start --pool unfreeze`, in this project's environment."""


Overlap = Literal["skip", "queue"]
"""What becomes of a start while the last flow run is still going: refused, or it waits."""
OVERLAPS = {"skip": ConcurrencyLimitStrategy.CANCEL_NEW, "queue": ConcurrencyLimitStrategy.ENQUEUE}


@dataclass(frozen=True)
class Schedule:
    """When Prefect starts a deployment by itself and with which values; one flow run at a time."""

    cron: str
    timezone: str
    overlap: Overlap
    values: dict[str, Any]


@contextmanager
def prefect_client(timeout_s: float | None = None) -> Iterator[SyncPrefectClient]:
    """Prefect's client, its errors turned into ours. With a timeout it is a new one, for a thread beside the flow run's own."""
    settings = None if timeout_s is None else {"timeout": timeout_s}
    with prefect_errors(), get_client(sync_client=True, httpx_settings=settings) as client:
        yield client


@contextmanager
def prefect_errors() -> Iterator[None]:
    """Turn Prefect's errors into ours, a flow's own among them: at its end it tells the server, which may have died meanwhile."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        where = shown(os.environ.get("PREFECT_API_URL", "its address"))
        raise ServiceError(
            f"Prefect at {where} failed: {error}", "Run the command again; where it fails again, look at Prefect's log."
        ) from error


def have_pool(client: SyncPrefectClient) -> None:
    """Make the work pool where there is none; a team's own of that name, of whatever type, stays as it is."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # somebody made it just now
            client.create_work_pool(_pool(command=None))


def have_pool_of_one_worker(client: SyncPrefectClient, command: str) -> None:
    """Make or change the work pool of an embedded Prefect, whose one worker starts a flow run with `command`.

    Without a command of its own Prefect starts each flow run in a session of its own, where it would outlive a killed worker unseen.
    """
    client.create_work_pool(_pool(command), overwrite=True)


def deploy(
    client: SyncPrefectClient,
    flow: str,
    name: str,
    *,
    entrypoint: str,
    parameters: dict[str, Any],
    description: str,
    schedule: Schedule | None = None,
) -> UUID:
    """Create or update a deployment; its id. `entrypoint` is a module path: it holds wherever this project is installed.

    `parameters` is the JSON Schema of what the flow takes.
    """
    have_pool(client)
    flow_id = client.create_flow_from_name(flow)
    return client.create_deployment(
        flow_id=flow_id,
        name=name,
        work_pool_name=POOL,
        entrypoint=entrypoint,
        parameter_openapi_schema=parameters,
        enforce_parameter_schema=True,
        description=description,
        **({} if schedule is None else _scheduled(schedule)),
    )


def end_as_failed(flow_run_id: str, words: str) -> State[Any]:
    """End the flow run at work as Failed, with these words and for good: what it must return.

    Set by force first: Prefect would try its failure again, where the flow has retries left (and does not count the first start of a flow
    run that has waited).
    """
    with prefect_client() as client:
        client.set_flow_run_state(UUID(flow_run_id), Failed(message=words), force=True)
    return Failed(message=words)  # another one: Prefect takes a state that it has seen for a subflow's, and gives it words of its own


def _scheduled(schedule: Schedule) -> dict[str, Any]:
    strikes = DeploymentScheduleCreate(schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone), active=True)
    return {
        "schedules": [strikes],
        "parameters": schedule.values,
        "concurrency_limit": 1,
        "concurrency_options": ConcurrencyOptions(collision_strategy=OVERLAPS[schedule.overlap]),
    }


def start_again_what_was_lost(client: SyncPrefectClient) -> list[UUID]:
    """Schedule anew each flow run that Prefect believes to be at work. Only for who knows that no worker lives: the ids.

    A flow run whose process was killed stays RUNNING for ever. Every flow of ours can be repeated.
    """
    at_work = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    lost = client.read_flow_runs(flow_run_filter=at_work, work_pool_filter=pool)
    for flow_run in lost:
        client.set_flow_run_state(flow_run.id, Scheduled(message="Its process was ended; it starts again."), force=True)
    return [flow_run.id for flow_run in lost]


def _pool(command: str | None) -> WorkPoolCreate:
    template = ProcessWorker.get_default_base_job_template()
    if command is not None:
        template["variables"]["properties"]["command"]["default"] = command
    said = "What Unfreeze leaves to Prefect: answers to requests for a promotion, scheduled retrainings."
    return WorkPoolCreate(name=POOL, type=ProcessWorker.type, description=said, base_job_template=template)
