"""The steps of the search: run it, and write it to MLflow with every trial as its child."""

from __future__ import annotations

import math
from typing import Any

from infra import progress, ray_cluster, tracking
from infra.tracking import Metric, RunRecord
from ray_jobs.spec import Spec
from tasks.policies import effect, step

FAILED = {"diverged", "out_of_memory", "failed"}


def _key(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], features: dict[str, Any]) -> list[Any]:
    return [spec.storage, spec.search.model_dump(mode="json"), dataset["version"], backbone["digest"], features["features"]]


@step(name="search", key=_key, timeout_s=48 * 3600)
def run_search(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    """The best unfreeze depth and learning rate, the best probe, and every trial."""
    from ray_jobs import search_on_ray

    with progress.step("Searching depth and learning rate") as on_progress, ray_cluster.connect():
        found: dict[str, Any] = search_on_ray.run_search(spec, dataset, backbone, features["features"], on_progress)
    return {**found, "cost": {**found["cost"], "prefix_s": features["seconds"]}}


@effect(name="record search", timeout_s=3600)
def record_search(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any]) -> str:
    """The search's run in MLflow, with a child run a trial; its run id."""
    with progress.step("Recording the search in MLflow"):
        experiment = tracking.experiment_id(spec.name)
        trials = search["trials_detail"]
        tags = common_tags(spec, dataset) | {"unfreeze.search_id": search["search_id"]}
        parent = tracking.write_run(experiment, _search_record(spec, backbone, search, tags))
        tracking.write_children(experiment, parent, [_trial_record(search["search_id"], trial, tags) for trial in trials])
    return parent


def common_tags(spec: Spec, dataset: dict[str, Any]) -> dict[str, str]:
    """The tags of every run of ours in MLflow."""
    return {"unfreeze.dataset_version": dataset["version"], "unfreeze.spec_digest": spec.digest}


def _search_record(spec: Spec, backbone: dict[str, Any], search: dict[str, Any], tags: dict[str, str]) -> RunRecord:
    best, trials = search["best"], search["trials_detail"]
    started_ms = min(int(trial["started_at"]) for trial in trials)
    figures = {
        "best_val_accuracy": best["accuracy"],
        "probe_val_accuracy": search["probe"]["accuracy"],
        "seconds": search["seconds"],
        "trials": len(trials),
    }
    params = {
        "backbone": backbone["name"],
        "weights": spec.backbone.weights,
        "best_unfreeze_depth": best["unfreeze_depth"],
        "best_lr": best["lr"],
        "searcher": spec.search.resolved_searcher,
        "scheduler": spec.search.scheduler,
        "num_trials": len(trials),
        "max_epochs": spec.search.max_epochs,
        "seed": spec.search.seed,
        "image_size": spec.data.image_size,
    }
    return RunRecord(
        identity=search["search_id"],
        name=f"search {search['search_id'][:8]}",
        tags=tags | {"unfreeze.kind": "search"},
        params=params,
        metrics=[Metric(key, float(value)) for key, value in figures.items()],
        started_ms=started_ms,
        ended_ms=started_ms + int(1000 * search["seconds"]),
    )


def _trial_record(search_id: str, trial: dict[str, Any], tags: dict[str, str]) -> RunRecord:
    started_ms = at_ms = int(trial["started_at"])
    metrics = []
    for point in trial["curve"]:
        at_ms += int(1000 * point["seconds"])
        values = {key: point[key] for key in ("val_accuracy", "val_loss", "train_loss") if point.get(key) is not None}
        metrics += [Metric(key, float(value), point["epoch"], at_ms) for key, value in values.items() if math.isfinite(value)]
    metrics.append(Metric("seconds", float(trial["seconds"])))
    return RunRecord(
        identity=f"{search_id}/{trial['trial_id']}",
        name=f"depth {trial['unfreeze_depth']}, lr {trial['lr']:.2g}",
        tags=tags | {"unfreeze.kind": "trial", "unfreeze.trial_id": str(trial["trial_id"]), "unfreeze.status": trial["status"]},
        params={"unfreeze_depth": trial["unfreeze_depth"], "lr": trial["lr"]},
        metrics=metrics,
        started_ms=started_ms,
        ended_ms=started_ms + int(1000 * trial["seconds"]),
        status="FAILED" if trial["status"] in FAILED else "FINISHED",
    )
