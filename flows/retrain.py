"""The main job: prepare -> cache -> search -> fit -> evaluate -> register -> publish -> promote -> report."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ray_jobs.spec import Spec
from tasks.accounts import with_account
from tasks.announcing import announce, notify
from tasks.backbones import prepare_backbone
from tasks.champion import find_champion
from tasks.datasets import prepare_data
from tasks.evaluation import evaluate
from tasks.features import cache_features, together
from tasks.heartbeat import with_heartbeat
from tasks.judging import asked_by_retraining, candidate_of, judge_version, roles
from tasks.lineage import lineage_of
from tasks.outcome import judged, retrain_outcome, skipped
from tasks.planning import plan_search
from tasks.promotion import settle
from tasks.promotion_page import show_promotion
from tasks.publishing import find_finished, publish, remember, start_onnx_export
from tasks.registration import register_model
from tasks.report_content import example_image, record_evaluation, render_report
from tasks.search import past_points, record_search, run_search, winner
from tasks.training import fit_winner
from tasks.turns import with_turn


@flow(name="retrain", flow_run_name="retrain {spec.name}", persist_result=False, validate_parameters=True)
@with_heartbeat
@with_turn
@with_account
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
    start_onnx_export(spec, dataset, fit)
    lineage = lineage_of(spec, dataset, backbone, search, fit)
    asked = asked_by_retraining(spec, dataset, fit)
    found = {"dataset": dataset, "features": together(features), "search": search, "fit": fit}
    settled = None
    while settled is None:  # once, unless another version becomes champion meanwhile
        champion = find_champion(spec, asked["request"])
        evaluation = evaluate(spec, dataset, roles(fit["model_uri"], fit["probe_model_uri"], champion))
        model = register_model(spec, dataset, backbone, search, fit, evaluation, example_image(dataset))
        verdict = judge_version(spec, dataset, evaluation, candidate_of(model, fit, lineage), champion, asked)
        parts = judged(found | {"evaluation": evaluation}, verdict)
        report = render_report(spec, parts)
        published = publish(spec, model, fit, evaluation, lineage, report, serves=verdict["is_champion"])
        settled = settle(spec, verdict)
    shown = record_evaluation(spec, parts, report)
    settled = show_promotion(spec, dataset, verdict, settled, shown["link"])
    outcome = retrain_outcome(parts, model, published, settled, flow_run.get_id(), time.monotonic() - started)
    announce(spec.name, outcome, search["trials_detail"], shown["link"])
    notify(spec, settled)
    remember(spec, dataset, backbones, outcome)
    return outcome | {"report_path": shown["path"]} | {key: settled[key] for key in ("page_path",) if key in settled}
