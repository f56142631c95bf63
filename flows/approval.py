"""The flow that carries out an answer given on Prefect's page; a worker runs it once somebody has answered.

Prefect creates it from the deployment "approval" (`tasks/approval_page.py`); `unfreeze promote --approve` answers without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Completed

from infra import local_stack
from infra.errors import UserError
from tasks.answering import answer_on_page
from tasks.approval_page import FLOW, answer_of
from tasks.deployments import end_as_failed

RETRIES = 3
RETRY_DELAY_S = 10
"""An int: Prefect's server refuses a fraction, and the flow run would crash."""

Carrier = Callable[..., dict[str, Any]]
"""`tasks.answering.answer_on_page`: it writes the answer into the ledger, and moves the champion where it was approved."""


@flow(name=FLOW, retries=RETRIES, retry_delay_seconds=RETRY_DELAY_S, persist_result=False)
def approval(storage: str, model: str, request_id: str) -> State[Any]:
    """Carry out the answer. A mistake of a person ends it as Failed with our words; a service that fails is tried again."""
    return carry_out(storage, model, request_id, answer_on_page)


def carry_out(storage: str, model: str, request_id: str, answer_request: Carrier) -> State[Any]:
    """What became of the answer on this flow run's page, as the flow run's last state."""
    this = flow_run.get_id() or ""
    try:
        given = answer_of(this)
        with local_stack.session(["s3", "mlflow"], storage=storage):
            entry = answer_request(storage, model, request_id, approve=given.answer == "approve", by=given.by, reason=given.reason)
    except UserError as mistake:
        return end_as_failed(this, str(mistake))
    done = "approved" if given.answer == "approve" else "rejected"
    return Completed(message=f"{done} by {given.by}" + (f": {entry['reason']}" if entry.get("reason") else ""))
