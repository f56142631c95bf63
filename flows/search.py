"""The search alone: prepare -> cache -> search, with its leaderboard."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ray_jobs.spec import Spec
from tasks.backbones import prepare_backbone
from tasks.datasets import prepare_data
from tasks.features import cache_features
from tasks.outcome import search_outcome
from tasks.planning import plan_search
from tasks.search import past_points, record_search, run_search


@flow(name="search", flow_run_name="search {spec.name}", persist_result=False, validate_parameters=True)
def search(spec: Spec) -> dict[str, Any]:
    """Search unfreeze depth and learning rate; what `search --json` prints."""
    dataset = prepare_data(spec)
    backbone = prepare_backbone(spec)
    plan = plan_search(spec, dataset, backbone)
    features = cache_features(spec, dataset, backbone, plan)
    found = run_search(spec, dataset, backbone, features, plan, past_points(spec, dataset, backbone))
    record_search(spec, dataset, backbone, found)
    return search_outcome(dataset, found, flow_run.get_id())
