"""What a command answers: the objects that `retrain --json` and `search --json` print, from the results of the steps. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray_jobs.search_space import point_of

SCORES = (
    "accuracy",
    "balanced_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "log_loss",
    "ece",
    "images",
    "per_class",
    "confusion",
)


def judged(parts: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """The parts of a retraining, with the verdict on its model and the seconds of each step so far."""
    places = {key: verdict[key] for key in ("version", "champion_version", "evidence_uri")}
    seconds = {
        "prepare": parts["dataset"]["seconds"],
        "cache": parts["features"]["seconds"],
        "search": parts["search"]["seconds"],
        "fit": parts["fit"]["seconds"],
        "evaluate": parts["evaluation"]["seconds"],
    }
    return {**parts, "decision": verdict["judgement"] | places, "verdict": verdict, "seconds": seconds | {"total": sum(seconds.values())}}


def retrain_outcome(
    parts: dict[str, Any],
    model: dict[str, Any],
    published: dict[str, Any],
    settled: dict[str, Any],
    flow_run_id: str | None,
    total_s: float,
) -> dict[str, Any]:
    """What `retrain --json` prints."""
    fit, scores, entry = parts["fit"], parts["evaluation"]["evaluation"], settled["entry"]
    challenger, champion, probe = (_scores(scores.get(role)) for role in ("challenger", "champion", "probe"))
    seconds = {**parts["seconds"], "publish": published["seconds"], "total": total_s}
    serving = settled["serving"]
    return {
        "status": settled["status"],
        "flow_run_id": flow_run_id,
        "dataset": _dataset(parts["dataset"]),
        "search": _search(parts["search"]),
        "fit": {
            "workers": fit["workers"],
            "epochs": fit["epochs"],
            "accuracy": fit["accuracy"],
            "checkpoint_uri": fit["checkpoint_uri"],
            "chosen": fit["chosen"],
            "chosen_reason": fit["chosen_reason"],
            "augmentation": fit["augmentation"],
            "falls_short": fit["falls_short"],
            "fits": fit["fits"],
        },
        "evaluation": {"challenger": challenger, "champion": champion, "probe": probe},
        "decision": parts["decision"],
        "request": settled["request"],
        "page": settled["page"],
        "ledger_entry": entry["number"] if entry else None,
        "model": {"name": model["name"], "version": model["version"], "champion_version": serving, "artifact_uri": model["artifact_uri"]},
        "publish": {key: published[key] for key in ("uri", "objects", "bytes", "verified", "onnx")},
        "report": f"{published['uri']}/report.html",
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
    }


def promotion_answer(name: str, settled: dict[str, Any]) -> dict[str, Any]:
    """What `promote --json` prints: the ledger's entry, or the request that waits for an answer."""
    found = settled["entry"] or settled["request"]
    return {"model": name, "status": settled["status"], "page": settled.get("page"), "page_path": settled.get("page_path"), **found}


def skipped(outcome: dict[str, Any], flow_run_id: str | None, total_s: float) -> dict[str, Any]:
    """The answer of a finished retraining, given again because nothing changed."""
    seconds = dict.fromkeys(outcome["seconds"], 0.0) | {"total": round(total_s, 2)}
    return {**outcome, "status": "skipped", "flow_run_id": flow_run_id, "seconds": seconds}


def search_outcome(parts: dict[str, Any], report: dict[str, str], flow_run_id: str | None) -> dict[str, Any]:
    """What `search --json` prints. A phase's seconds are those of its making, also where its kept result was taken."""
    dataset, search = parts["dataset"], parts["search"]
    phases = {"prepare": [dataset], "backbone": parts["backbones"], "plan": parts["plans"], "cache": parts["features"], "search": [search]}
    seconds = {phase: round(sum(one["seconds"] for one in steps), 2) for phase, steps in phases.items()}
    columns = ("accuracy", "last_accuracy", "epochs", "epochs_run", "status", "reason", "seconds")
    trials = [asdict(point_of(trial)) | {column: trial[column] for column in columns} for trial in search["trials_detail"]]
    return {
        "flow_run_id": flow_run_id,
        "dataset": _dataset(dataset),
        "search": _search(search),
        "trials_detail": trials,
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "cost": search["cost"],
        "decisions": search["decisions"],
        "report": report["uri"],
        "report_path": report["path"],
    }


def _dataset(dataset: dict[str, Any]) -> dict[str, Any]:
    keys = ("version", "images", "classes", "train", "val", "holdout", "quarantined", "uri")
    return {key: dataset[key] for key in keys} | {"classes": len(dataset["classes"]), "labels": dataset["classes"]}


def _search(search: dict[str, Any]) -> dict[str, Any]:
    several = len(search.get("backbones", ())) > 1
    best = {key: search["best"][key] for key in ("unfreeze_depth", "lr", "accuracy", *(["backbone"] if several else []))}
    return {
        "search_id": search["search_id"],
        "trials": search["trials"],
        "best": best,
        "seconds": search["seconds"],
        "leaderboard_uri": search["leaderboard_uri"],
    }


def _scores(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: metrics[key] for key in SCORES} if metrics else None
