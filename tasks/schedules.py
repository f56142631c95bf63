"""Scheduled retrainings in Prefect: the deployment with the spec as its form, and the one night that stands for all that were missed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelled
from prefect.utilities.callables import parameter_schema
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from infra.errors import UserError
from ray_jobs.spec import Spec
from tasks.deployments import Overlap, Schedule, deploy, prefect_client

FLOW = "nightly"
ENTRYPOINT = "flows.deployments.nightly"


def schedule(spec: Spec, *, cron: str, timezone: str, overlap: Overlap) -> dict[str, str]:
    """Create or change the deployment that retrains this spec: its name, id and the URL of its page."""
    values = {"spec": spec.model_dump(mode="json")}
    with prefect_client() as client:
        try:
            deployment_id = deploy(
                client,
                FLOW,
                spec.name,
                entrypoint=ENTRYPOINT,
                parameters=form(),
                description=f"Retrains {spec.name}. What did not change since the last night is not computed again.",
                schedule=Schedule(cron, timezone, overlap, values),
            )
        except ValidationError as refused:  # Prefect's own reading of a schedule is not ours
            raise UserError(
                f"Prefect refuses the schedule: {refused.errors()[0]['msg']}", "Write --cron and --timezone otherwise."
            ) from None
    name, url = f"{FLOW}/{spec.name}", url_for("deployment", obj_id=deployment_id) or ""
    return {"deployment": name, "id": str(deployment_id), "url": url}


def form() -> dict[str, Any]:
    """The JSON Schema of what the flow takes: Prefect draws its form from it, and refuses values that do not fit."""

    def nightly(spec: Spec) -> None:
        """Only its signature is read."""

    return parameter_schema(nightly).model_dump()


def stand_for_the_others(flow_run_id: str) -> list[UUID]:
    """Cancel every other start of the same work that is due by now, since this one does it; the ids.

    Prefect schedules some nights ahead, and marks them late while nobody works: after a week without a worker they would all start. A
    start that waits for this one to end is due too, and would find no more to do; what was asked with other values stays.
    """
    with prefect_client() as client:
        this = client.read_flow_run(UUID(flow_run_id))
        others = [other for other in _due(client, this) if other.id != this.id and other.parameters == this.parameters]
        for other in others:
            client.set_flow_run_state(other.id, Cancelled(message=f"Missed: the flow run {this.name} stands for it."))
        return [other.id for other in others]


def _due(client: SyncPrefectClient, this: FlowRun) -> list[FlowRun]:
    """What the deployment should have started by now, by the time first planned: who waits for a place is put off again and again."""
    if this.deployment_id is None:
        return []
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[this.deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        )
    )
