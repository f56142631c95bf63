"""The steps of the search: run it, and write it to MLflow with every trial as its child."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prefect.runtime import flow_run

from infra import progress, tracking
from infra.progress import OnProgress
from infra.tracking import Metric, RunRecord
from ray_jobs import step_work
from ray_jobs.search_space import TrialConfig, backbone_in_points, dimensions, point_of, warm_places
from ray_jobs.spec import Range, Spec
from ray_jobs.watch import Watch
from tasks.accounts import metrics_of
from tasks.backbones import digests
from tasks.features import together
from tasks.planning import whole_plan
from tasks.policies import effect, step
from tasks.ray_job import FLOW_RUN
from tasks.ray_work import run_on_ray

FAILED = {"diverged", "out_of_memory", "failed"}


Values = dict[str, Any]


Each = list[dict[str, Any]]
"""One for each backbone of the search, the spec's own first."""


Warm = dict[str, list[Values]]


def _key(spec: Spec, dataset: Values, backbones: Each, features: Each, plans: Each, warm: Warm, fits: bool = True) -> list[Any]:
    return [spec.storage, spec.search.content, spec.fit.augmentation, dataset["version"], *digests(backbones), warm]


@step(name="search", key=_key, timeout_s=48 * 3600)
def run_search(spec: Spec, dataset: Values, backbones: Each, features: Each, plans: Each, warm: Warm, fits: bool = True) -> Values:
    """The best point of the search, the best probe of its backbone, and every trial; `fits`: its winner will be fitted here too."""
    plan = whole_plan(backbones, plans)
    arguments = {
        "spec": spec.model_dump(mode="json"),
        "dataset": dataset,
        "backbones": backbones,
        "features": [one["features"] for one in features],
        "sources": [one["source"] for one in plans],
        "warm": warm["points"],
        "fits": fits,
    }
    with progress.step(f"Searching depth and learning rate, about {plan['trials_s']:.0f} s") as on_progress:
        watch = Watch(_loading_what_comes_next(on_progress), progress.say, on_progress.waits)
        found = run_on_ray(step_work.run_search, arguments, storage=spec.storage, watch=watch)
    prefix_s = together(features)["seconds"]
    cost = {"estimated_s": plan["estimated_s"], "prefix_s": prefix_s, "measured_s": prefix_s + found["seconds"]}
    return {**found, "cost": {**found["cost"], **cost}, "plan": plan}


def winner(backbones: Each, search: Values) -> Values:
    """The backbone of the search's best trial."""
    return next((one for one in backbones if one["name"] == search["best"].get("backbone")), backbones[0])


def _loading_what_comes_next(on_progress: OnProgress) -> OnProgress:
    """Load MLflow's client and the report's figures, which take seconds, once trials run and this process has nothing to do."""
    loading = threading.Thread(target=_load_what_comes_next, daemon=True)

    def watched(done: float, total: float) -> None:
        if loading.ident is None:
            loading.start()
        on_progress(done, total)

    return watched


def _load_what_comes_next() -> None:
    for module in ("mlflow.tracking", "tasks.report_search"):
        importlib.import_module(module)


def _warm_key(spec: Spec, dataset: Values, backbones: Each) -> list[Any]:
    return [spec.name, spec.storage, spec.search.content, dataset["version"], *digests(backbones)]


@step(name="look up past searches", key=_warm_key, timeout_s=600)
def past_points(spec: Spec, dataset: Values, backbones: Each) -> dict[str, list[Values]]:
    """The best points of this model's past searches of the same backbones, best first; none unless the spec asks for a warm start.

    A step, so that a search that is taken up again starts from the same points, whatever has ended meanwhile.
    """
    if not spec.search.warm_start:
        return {"points": []}
    wanted = dimensions(spec.search)
    points: dict[TrialConfig, float] = {}
    for name in (backbone["name"] for backbone in backbones):
        for params, metrics in tracking.past_trials(spec.name, name):
            point = _point({**params, "backbone": backbone_in_points(spec, name)}, wanted)
            if point is not None and "best_val_accuracy" in metrics:
                points[point] = max(points.get(point, 0.0), metrics["best_val_accuracy"])
    ordered = sorted(points, key=lambda point: (-points[point], point.unfreeze_depth, point.lr))
    return {"points": [asdict(point) for point in ordered[: warm_places(spec.search)]]}


def _point(params: Mapping[str, str], wanted: Mapping[str, Any]) -> TrialConfig | None:
    """A past trial as a point of this search's space; None where it lies outside."""
    params = {"augmentation_strength": "1.0", **params}  # a trial from before it was a dimension used it all
    values: Values = {}
    for name, allowed in wanted.items():
        if name not in params:
            return None
        value: Any = params[name] if name in ("optimizer", "backbone") else float(params[name])
        value = int(value) if name in ("unfreeze_depth", "batch_size") else value
        inside = allowed.low <= value <= allowed.high if isinstance(allowed, Range) else value in allowed
        if not inside:
            return None
        values[name] = value
    return TrialConfig(**values)


@effect(name="record search", timeout_s=3600)
def record_search(spec: Spec, dataset: Values, backbones: Each, search: Values) -> str:
    """The search's run in MLflow, with a child run a trial; its run id."""
    with progress.step("Recording the search in MLflow"):
        experiment = tracking.experiment_id(spec.name)
        trials = search["trials_detail"]
        tags = common_tags(spec, dataset) | {"unfreeze.search_id": search["search_id"]}
        parent = tracking.write_run(experiment, _search_record(spec, backbones, search, tags))
        tracking.write_children(experiment, parent, [_trial_record(search["search_id"], backbones, trial, tags) for trial in trials])
    return parent


def common_tags(spec: Spec, dataset: dict[str, Any]) -> dict[str, str]:
    """The tags of every run of ours in MLflow."""
    return {"unfreeze.dataset_version": dataset["version"], "unfreeze.spec_digest": spec.digest} | _written_by()


def _written_by() -> dict[str, str]:
    """Whoever finds a run half-written asks what became of this flow run."""
    this = flow_run.get_id()
    return {FLOW_RUN: this} if this else {}


def _search_record(spec: Spec, backbones: Each, search: Values, tags: dict[str, str]) -> RunRecord:
    best, trials = search["best"], search["trials_detail"]
    started_ms = min(int(trial["started_at"]) for trial in trials)
    figures = {
        "best_val_accuracy": best["accuracy"],
        "probe_val_accuracy": search["probe"]["accuracy"],
        "seconds": search["seconds"],
        "trials": len(trials),
    }
    params = {
        "backbone": ", ".join(backbone["name"] for backbone in backbones),
        "weights": ", ".join(dict.fromkeys(backbone.weights for backbone in spec.backbones)),
        "best_unfreeze_depth": best["unfreeze_depth"],
        "best_lr": best["lr"],
        "searcher": spec.search.resolved_searcher,
        "scheduler": spec.search.scheduler,
        "num_trials": len(trials),
        "max_epochs": spec.search.max_epochs,
        "seed": spec.search.seed,
        "image_size": spec.data.image_size,
    } | ({"best_backbone": best["backbone"]} if len(backbones) > 1 else {})
    return RunRecord(
        identity=search["search_id"],
        name=f"search {search['search_id'][:8]}",
        tags=tags | {"unfreeze.kind": "search"},
        params=params,
        metrics=[*(Metric(key, float(value)) for key, value in figures.items()), *metrics_of(search)],
        started_ms=started_ms,
        ended_ms=started_ms + int(1000 * search["seconds"]),
    )


def _trial_record(search_id: str, backbones: Each, trial: Values, tags: dict[str, str]) -> RunRecord:
    started_ms = at_ms = int(trial["started_at"])
    backbone = trial.get("backbone") or backbones[0]["name"]
    metrics = []
    for point in trial["curve"]:
        at_ms += int(1000 * point["seconds"])
        values = {key: point[key] for key in ("val_accuracy", "val_loss", "train_loss") if point.get(key) is not None}
        metrics += [Metric(key, float(value), point["epoch"], at_ms) for key, value in values.items() if math.isfinite(value)]
    metrics.append(Metric("seconds", float(trial["seconds"])))
    if trial["accuracy"] is not None:
        metrics.append(Metric("best_val_accuracy", float(trial["accuracy"])))
    return RunRecord(
        identity=f"{search_id}/{trial['trial_id']}",
        name=(f"{backbone}, " if len(backbones) > 1 else "") + f"depth {trial['unfreeze_depth']}, lr {trial['lr']:.2g}",
        tags=tags | {"unfreeze.kind": "trial", "unfreeze.trial_id": str(trial["trial_id"]), "unfreeze.status": trial["status"]},
        params=asdict(point_of(trial)) | {"backbone": backbone},
        metrics=metrics,
        started_ms=started_ms,
        ended_ms=started_ms + int(1000 * trial["seconds"]),
        status="FAILED" if trial["status"] in FAILED else "FINISHED",
    )
