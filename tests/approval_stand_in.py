"""The flow that carries out an answer, with a stand-in for the ledger: it writes the answer to S3.

Ann may not approve her own request, and where Cleo answers the service fails the first time.
"""

from __future__ import annotations

import json
import os
from typing import Any

from prefect import State, flow

from flows.approval import carry_out
from infra.errors import ServiceError, UserError
from infra.object_store import join_uri, object_store

ENTRYPOINT = "tests.approval_stand_in.approval"


@flow(name="approval", retries=1, retry_delay_seconds=1, persist_result=False)
def approval(storage: str, model: str, request_id: str) -> State[Any]:
    return carry_out(storage, model, request_id, write_down)


def write_down(storage: str, model: str, request_id: str, *, approve: bool, by: str, reason: str) -> dict[str, Any]:
    if by == "ann":
        raise UserError("ann has asked for it herself.", "Somebody else answers.")
    tried = join_uri(storage, "tried", request_id)
    if by == "cleo" and not object_store().exists(tried):
        object_store().write(tried, b"")
        raise ServiceError("The ledger cannot be reached.")
    answer = {"model": model, "approve": approve, "by": by, "reason": reason, "mlflow": "MLFLOW_TRACKING_URI" in os.environ}
    object_store().write(join_uri(storage, "answers", request_id), json.dumps(answer).encode())
    return answer
