"""The steps that gather what the report shows, render it, and hand it to MLflow, Prefect and the local disk."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from infra import progress, settings, tracking
from infra.object_store import object_store
from infra.tracking import Metric, RunRecord
from ray_jobs.dataset import Dataset, open_dataset
from ray_jobs.spec import Spec, digest_of
from tasks.accounts import metrics_of
from tasks.lineage import git_commit
from tasks.policies import effect
from tasks.promotion_page import page_content
from tasks.search import common_tags

SAMPLES_PER_CLASS = 2
REPORT = "report.html"
VERSIONS = ("torch", "timm", "ray", "mlflow", "prefect")


@effect(name="take an example image", timeout_s=300)
def example_image(dataset: dict[str, Any]) -> bytes:
    """The encoded bytes of the first training image, as the registered model's input example."""
    _, image = next(iter(_open(dataset).images(["train"])))
    return image


@effect(name="render report", timeout_s=600)
def render_report(spec: Spec, parts: dict[str, Any]) -> str:
    """The report of one retraining as HTML text, the same for the same parts."""
    from tasks.report import ReportContent, render  # plotly takes its time to load; here and below a search has loaded it meanwhile

    with progress.step("Rendering the report"):
        dataset = _open(parts["dataset"])
        fit, evaluation = parts["fit"], parts["evaluation"]
        content = ReportContent(
            name=spec.name,
            created_at=evaluation["at"],
            spec=_shown(spec),
            versions=_versions(),
            git_commit=git_commit(),
            dataset=parts["dataset"],
            stats=dataset.stats,
            samples=_samples(dataset),
            search=parts["search"],
            fit=fit,
            chosen=fit["chosen"],
            chosen_reason=fit["chosen_reason"],
            evaluation=evaluation["evaluation"],
            mistakes=_mistakes(dataset, evaluation["mistakes"]),
            decision=parts["decision"],
            seconds=parts["seconds"],
            features=parts["features"],
            promotion=page_content(spec.name, parts["dataset"], parts["verdict"]),
        )
        return render(content)


@effect(name="record evaluation", timeout_s=600)
def record_evaluation(spec: Spec, parts: dict[str, Any], report: str) -> dict[str, str]:
    """The evaluation's run in MLflow, the report beside it there, on Prefect's page and on this disk; where the report can be opened."""
    evaluation, version = parts["evaluation"], parts["decision"]["version"]
    path = _local_copy(f"{spec.name}-{version}", report)
    with progress.step("Recording the evaluation in MLflow"), tempfile.TemporaryDirectory() as scratch:
        figures = Path(scratch) / "evaluation.json"
        figures.write_text(json.dumps(evaluation["evaluation"], indent=1))
        copy = Path(scratch) / REPORT
        copy.write_text(report, encoding="utf-8", errors="replace")
        experiment = tracking.experiment_id(spec.name)
        run_id = tracking.write_run(experiment, _evaluation_record(spec, parts, {"evaluation.json": figures, REPORT: copy}))
    return {"path": str(path), "link": tracking.link(experiment, run_id, REPORT), "run_id": run_id}


@effect(name="report search", timeout_s=600)
def report_search(spec: Spec, parts: dict[str, Any], run_id: str) -> dict[str, str]:
    """The page of a search, on this disk and beside its run in MLflow: its path, its URI, and the link by which MLflow shows it."""
    from tasks.report_search import SearchContent, render

    with progress.step("Rendering the report"):
        content = SearchContent(
            name=spec.name, spec=_shown(spec), versions=_versions(), git_commit=git_commit(), dataset=parts["dataset"],
            search=parts["search"], features=parts["features"],
        )  # fmt: skip
        path = _local_copy(f"{spec.name}-search-{parts['search']['search_id'][:8]}", render(content))
        tracking.add_file(run_id, path, as_name=REPORT)
    return {"path": str(path), "uri": f"runs:/{run_id}/{REPORT}", "link": tracking.link(tracking.experiment_id(spec.name), run_id, REPORT)}


def _shown(spec: Spec) -> dict[str, Any]:
    return {**spec.model_dump(mode="json"), "promotion": spec.promotion.shown}


def _local_copy(name: str, report: str) -> Path:
    path = settings.home_dir() / "reports" / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report, encoding="utf-8", errors="replace")
    return path


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def _evaluation_record(spec: Spec, parts: dict[str, Any], files: dict[str, Path]) -> RunRecord:
    evaluation, decision = parts["evaluation"], parts["decision"]
    at_ms = int(datetime.fromisoformat(evaluation["at"]).timestamp() * 1000)
    names = ("accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1", "log_loss", "ece")
    metrics = [
        Metric(f"{role}_{name}", scores[name])
        for role, scores in evaluation["evaluation"].items()
        if scores
        for name in names
        if scores[name] is not None
    ]
    tags = common_tags(spec, parts["dataset"]) | {
        "unfreeze.kind": "evaluation",
        "unfreeze.search_id": parts["search"]["search_id"],
        "unfreeze.verdict": decision["status"],
        "unfreeze.version": decision["version"],
    }
    return RunRecord(
        identity=digest_of([evaluation["at"], parts["fit"]["fit_id"], decision]),
        name=f"evaluation of version {decision['version']}",
        tags=tags,
        params={"champion_version": decision["champion_version"], "reason": decision["reason"]},
        metrics=[*metrics, Metric("seconds", float(evaluation["seconds"])), *metrics_of(evaluation)],
        started_ms=at_ms,
        ended_ms=at_ms + int(1000 * evaluation["seconds"]),
        files={"": next(iter(files.values())).parent},
    )


def _open(dataset: dict[str, Any]) -> Dataset:
    return open_dataset(dataset["uri"], object_store(), settings.cache_dir() / "datasets")


def _samples(dataset: Dataset) -> list[dict[str, Any]]:
    from tasks.report import thumbnail

    wanted = dict.fromkeys(dataset.classes, SAMPLES_PER_CLASS)
    samples: dict[str, list[dict[str, Any]]] = {label: [] for label in dataset.classes}
    for row, image in dataset.images(["train"]):
        label = dataset.classes[row.label_index]
        if wanted[label]:
            wanted[label] -= 1
            samples[label].append({"label": label, "image": thumbnail(image)})
        if not any(wanted.values()):
            break
    return [sample for found in samples.values() for sample in found]


def _mistakes(dataset: Dataset, mistakes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from tasks.report import thumbnail

    wanted = {mistake["sha256"] for mistake in mistakes}
    images = {row.sha256: image for row, image in dataset.images(["holdout"]) if row.sha256 in wanted} if wanted else {}
    return [{**mistake, "image": thumbnail(images[mistake["sha256"]])} for mistake in mistakes if mistake["sha256"] in images]
