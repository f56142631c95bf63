"""The nightly flow, with a stand-in for the retraining: the spec's name says what becomes of it.

"shaky" fails the first time, "away" each time, "missed" never ends the first time, "bug" is one.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import State, flow

from flows.deployments import carry_out
from infra.errors import ServiceError
from infra.object_store import join_uri, object_store
from ray_jobs.spec import Spec
from tasks.heartbeat import with_heartbeat
from tasks.schedules import FLOW

ENTRYPOINT = "tests.nightly_stand_in.nightly"


@flow(name=FLOW, retries=1, retry_delay_seconds=1, persist_result=False)
@with_heartbeat
def nightly(spec: dict[str, Any]) -> State[Any]:
    return carry_out(spec, work)


def work(spec: Spec) -> dict[str, Any]:
    if spec.name == "bug":
        raise KeyError("loss")
    tried = join_uri(spec.storage, "tried", spec.name)
    if spec.name == "away" or not object_store().exists(tried):
        object_store().write(tried, b"")
        if spec.name == "missed":
            time.sleep(3600)  # until it is killed
        raise ServiceError("MLflow is away.", "Look at it.")
    return {"status": "skipped", "model": {"version": "7"}}
