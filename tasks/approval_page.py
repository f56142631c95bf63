"""The flow run on whose page a person answers a request for a promotion: it waits as a row in Prefect's database, and costs no process.

It is created suspended, with the form of the answer. Whoever answers makes Prefect schedule it, and a worker carries it out
(`flows/approval.py`). Order of writes: the flow run, then its form, then the artifact; asking again writes what a killed command
has left out, and Prefect refuses an answer for which there is no form yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from httpx import HTTPStatusError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateDetails, StateType
from prefect.input import RunInput
from prefect.states import Cancelled, Completed, Suspended
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError

from infra.errors import UserError
from tasks.deployments import deploy, prefect_client

FLOW = "approval"
ENTRYPOINT = "flows.approval.approval"
PARAMETERS = ("storage", "model", "request_id")
CONFLICT = 409
NOT_FOUND = 404


class Answer(RunInput):
    """The form on Prefect's page."""

    answer: Literal["approve", "reject"] = Field(description="approve: this version serves from now on.")
    by: str = Field(min_length=1, max_length=200, title="Your name", description="It goes into the ledger.")
    reason: str = Field("", max_length=2000, description="It goes into the ledger.")


@dataclass(frozen=True)
class Waiting:
    """A page that waits for an answer: its flow run's name, and what was asked where."""

    name: str
    storage: str
    model: str
    request_id: str


FORM = {part: f"{FLOW}-{part}" for part in ("description", "response", "schema")}
"""The keys under which Prefect keeps the form and its answer, beside the flow run."""


def ask(request: dict[str, Any]) -> dict[str, str]:
    """Have one flow run wait for the answer to this request: its id and the URL of its page. Asking again finds the same one.

    Where the last one has ended and the request is asked again (an answer failed), another one waits.
    """
    with prefect_client() as client:
        known = _pages_of(client, request["id"])
        flow_run = known[0] if known and not _has_ended(known[0]) else _new_page(client, request, len(known))
        _write_form(client, flow_run.id, request)
        return {"flow_run_id": str(flow_run.id), "url": url_for("flow-run", obj_id=flow_run.id) or ""}


def close(request_id: str, words: str, *, approved: bool) -> bool:
    """End the flow run that waits for an answer which came another way, or never. Whether there was one.

    One that is at work already carries out an answer given on its page: it ends by itself.
    """
    with prefect_client() as client:
        known = _pages_of(client, request_id)
        waiting = [
            flow_run for flow_run in known if flow_run.state is not None and (flow_run.state.is_paused() or flow_run.state.is_scheduled())
        ]
        end: State[Any] = Completed(message=words) if approved else Cancelled(message=words)
        for flow_run in waiting:
            client.set_flow_run_state(flow_run.id, end)
        return bool(waiting)


def waiting(model: str | None = None) -> list[Waiting]:
    """The pages on which nobody has answered yet, of one model or of all."""
    paused = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
    tagged = None if model is None else FlowRunFilterTags(all_=[model])
    this = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    with prefect_client() as client:
        found = client.read_flow_runs(flow_filter=this, flow_run_filter=FlowRunFilter(state=paused, tags=tagged))
    return [Waiting(one.name, *(str(one.parameters.get(name)) for name in PARAMETERS)) for one in found]


def answer_of(flow_run_id: str) -> Answer:
    """What was answered on the flow run's page. Raises UserError where nothing was."""
    with prefect_client() as client:
        try:
            given = client.read_flow_run_input(UUID(flow_run_id), FORM["response"])
        except HTTPStatusError as error:
            if error.response.status_code != NOT_FOUND:
                raise
            raise UserError("Nobody has answered this request on its page.", "Press Resume on the page of a request that waits.") from None
    try:
        return Answer.model_validate_json(given)
    except ValidationError as error:
        raise UserError(f"The answer cannot be read: {error}", "Answer with `unfreeze promote --approve` or `--reject`.") from None


def _pages_of(client: SyncPrefectClient, request_id: str) -> list[FlowRun]:
    """The flow runs that have asked for this answer, the latest first."""
    tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=[_tag(request_id)]))
    found = client.read_flow_runs(flow_run_filter=tagged)
    return sorted(found, key=_round, reverse=True)


def _round(flow_run: FlowRun) -> int:
    return int((flow_run.idempotency_key or "0").rpartition(" ")[2])


def _has_ended(flow_run: FlowRun) -> bool:
    return flow_run.state is not None and flow_run.state.is_final()


def _new_page(client: SyncPrefectClient, request: dict[str, Any], count: int) -> FlowRun:
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in PARAMETERS}, "required": list(PARAMETERS)}
    said = "Carries out what a person answers to a request for a promotion."
    deployment_id = deploy(client, FLOW, FLOW, entrypoint=ENTRYPOINT, parameters=schema, description=said)
    return client.create_flow_run_from_deployment(
        deployment_id,
        parameters={"storage": request["storage"], "model": request["model"], "request_id": request["id"]},
        name=f"{request['model']} version {request['version']}?",
        state=_waiting(request),
        tags=[_tag(request["id"]), request["model"]],
        idempotency_key=f"{request['id']} {count}",
    )


def _waiting(request: dict[str, Any]) -> State[Any]:
    return Suspended(
        message=f"{request['by']} asks for version {request['version']} of {request['model']}: press Resume to answer.",
        pause_key=FLOW,
        pause_expiration_time=datetime.fromisoformat(request["expires_at"]),
        state_details=StateDetails(run_input_keyset=FORM),
    )


def _write_form(client: SyncPrefectClient, flow_run_id: UUID, request: dict[str, Any]) -> None:
    told = page_text(request)
    for part, value in (("description", told), ("schema", Answer.model_json_schema())):
        with _unless_it_is_there():
            client.create_flow_run_input(flow_run_id, FORM[part], json.dumps(value))
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    if not client.read_artifacts(artifact_filter=mine):
        said = f"Should version {request['version']} of {request['model']} serve?"
        client.create_artifact(ArtifactCreate(key="request", type="markdown", description=said, data=told, flow_run_id=flow_run_id))


@contextmanager
def _unless_it_is_there() -> Iterator[None]:
    try:
        yield
    except HTTPStatusError as error:
        if error.response.status_code != CONFLICT:
            raise


def page_text(request: dict[str, Any]) -> str:
    """What a person reads before answering, as Markdown."""
    champion = request.get("champion_version")
    page = str(request.get("page") or "")
    report = f"[the report]({page})" if re.fullmatch(r"https?://[^\s()<>]+", page) else f"`{_code(page)}`" if page else "none"
    return f"""### Should version {_plain(request["version"])} of {_plain(request["model"])} serve?

- **asked by** {_plain(request["by"])}, {_minute(request["at"])}; expires {_minute(request["expires_at"])}
- **serves now:** {f"version {_plain(champion)}" if champion else "nothing"}
- **verdict of the gate:** {_plain(request["reason"])}
- **report:** {report}
- **evidence:** `{_code(request["evidence_uri"])}`

Answer here (**Resume**), or run `unfreeze promote {_code(request["model"])} --approve {_code(request["id"])}` (or `--reject`).
"""


def _minute(at: str) -> str:
    return datetime.fromisoformat(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _plain(text: object) -> str:
    """A person's text, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    return " ".join(str(text).replace("`", "").split())


def _tag(request_id: str) -> str:
    return f"request {request_id}"
