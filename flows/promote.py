"""Judge a registered version against the champion, and carry the verdict out: what a lead asks for between two retrainings."""

from __future__ import annotations

from typing import Any

from prefect import flow

from ray_jobs.spec import Spec
from tasks.accounts import with_account
from tasks.announcing import notify
from tasks.champion import find_champion
from tasks.evaluation import evaluate
from tasks.heartbeat import with_heartbeat
from tasks.judging import asked_by_person, judge_version, roles
from tasks.promotion import settle
from tasks.promotion_page import show_promotion


@flow(name="promote", flow_run_name="promote {spec.name}", persist_result=False, validate_parameters=True)
@with_heartbeat
@with_account
def promote(spec: Spec, dataset: dict[str, Any], model: dict[str, Any], reason: str) -> dict[str, Any]:
    """The status, and the ledger's entry or the request for approval; `dataset` and `model` as `tasks.candidate` finds them."""
    asked = asked_by_person(reason)
    settled = None
    while settled is None:  # once, unless another version becomes champion meanwhile
        champion = find_champion(spec, asked["request"])
        evaluation = evaluate(spec, dataset, roles(model["model_uri"], model["probe_uri"], champion))
        verdict = judge_version(spec, dataset, evaluation, model, champion, asked)
        settled = settle(spec, verdict)
    settled = show_promotion(spec, dataset, verdict, settled, None)
    notify(spec, settled)
    return settled
