"""The search alone: prepare -> cache -> search -> report, with its leaderboard."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ray_jobs.spec import Spec
from tasks.accounts import with_account
from tasks.announcing import announce_search
from tasks.backbones import prepare_backbone
from tasks.datasets import prepare_data
from tasks.features import cache_features, together
from tasks.heartbeat import with_heartbeat
from tasks.outcome import search_outcome
from tasks.planning import plan_search
from tasks.report_content import report_search
from tasks.search import past_points, record_search, run_search
from tasks.turns import with_turn


@flow(name="search", flow_run_name="search {spec.name}", persist_result=False, validate_parameters=True)
@with_heartbeat
@with_turn
@with_account
def search(spec: Spec) -> dict[str, Any]:
    """Search unfreeze depth and learning rate; what `search --json` prints."""
    dataset = prepare_data(spec)
    backbones = [prepare_backbone(spec.with_backbone(backbone)) for backbone in spec.backbones]
    plans = [plan_search(spec, dataset, backbone) for backbone in backbones]
    features = [cache_features(spec, dataset, backbone, plan) for backbone, plan in zip(backbones, plans, strict=True)]
    found = run_search(spec, dataset, backbones, features, plans, past_points(spec, dataset, backbones), fits=False)
    run_id = record_search(spec, dataset, backbones, found)
    report = report_search(spec, {"dataset": dataset, "features": together(features), "search": found}, run_id)
    announce_search(spec.name, found["trials_detail"], report["link"])
    parts = {"dataset": dataset, "backbones": backbones, "plans": plans, "features": features, "search": found}
    return search_outcome(parts, report, flow_run.get_id())
