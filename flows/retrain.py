"""The main job: prepare -> cache -> search -> fit -> evaluate -> register -> publish -> promote -> report."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ray_jobs.spec import Spec
from tasks.announcing import announce
from tasks.backbones import prepare_backbone
from tasks.datasets import prepare_data
from tasks.evaluation import evaluate
from tasks.features import cache_features, together
from tasks.outcome import judged, retrain_outcome, skipped
from tasks.planning import plan_search
from tasks.promotion import find_champion, promote
from tasks.publishing import find_finished, publish, remember
from tasks.registration import register_model
from tasks.report_content import example_image, record_evaluation, render_report
from tasks.search import past_points, record_search, run_search, winner
from tasks.training import fit_winner


@flow(name="retrain", flow_run_name="retrain {spec.name}", persist_result=False, validate_parameters=True)
def retrain(spec: Spec) -> dict[str, Any]:
    """Find, fit, judge and publish the next version of one model; what `retrain --json` prints."""
    started = time.monotonic()
    dataset = prepare_data(spec)
    backbones = [prepare_backbone(spec.with_backbone(backbone)) for backbone in spec.backbones]
    finished = find_finished(spec, dataset, backbones)
    if finished:
        return skipped(finished, flow_run.get_id(), time.monotonic() - started)
    plans = [plan_search(spec, dataset, backbone) for backbone in backbones]
    features = [cache_features(spec, dataset, backbone, plan) for backbone, plan in zip(backbones, plans, strict=True)]
    search = run_search(spec, dataset, backbones, features, plans, past_points(spec, dataset, backbones))
    record_search(spec, dataset, backbones, search)
    backbone = winner(backbones, search)
    fit = fit_winner(spec, dataset, backbone, search)
    champion = find_champion(spec)
    models = {"challenger": fit["model_uri"], "probe": fit["probe_model_uri"]} | (
        {"champion": champion["artifact_uri"]} if champion else {}
    )
    evaluation = evaluate(spec, dataset, models)
    model = register_model(spec, dataset, backbone, search, fit, evaluation, example_image(dataset))
    found = {"dataset": dataset, "features": together(features), "search": search, "fit": fit, "evaluation": evaluation}
    parts = judged(spec, found, model, champion)
    report = render_report(spec, parts)
    published = publish(spec, model, fit, evaluation, report)
    serving = promote(spec, model["version"], parts["decision"], champion["version"] if champion else None)
    shown = record_evaluation(spec, parts, report)
    outcome = retrain_outcome(parts, model, published, serving, flow_run.get_id(), time.monotonic() - started)
    announce(spec.name, outcome, search["trials_detail"], shown["link"])
    remember(spec, dataset, backbones, outcome)
    return outcome | {"report_path": shown["path"]}
