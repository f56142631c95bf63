"""The steps that publish an accepted version to S3, and that remember a finished retraining so that the next one can skip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape

from infra import progress, ray_cluster, registry, settings
from infra.committed_folder import commit, fetch, read_manifest, verify
from infra.errors import ServiceError
from infra.object_store import ObjectStore, join_uri, object_store
from ray_jobs import step_work
from ray_jobs.spec import Spec, digest_of
from ray_jobs.watch import Watch
from tasks.backbones import digests
from tasks.ledger_book import follow, open_book, tell
from tasks.lineage import LINEAGE
from tasks.policies import effect
from tasks.ray_work import in_this_process, run_on_ray

MODEL_FILES = ("model.safetensors", "config.json", "labels.json", "preprocessing.json")


@effect(name="start the ONNX export", timeout_s=300)
def start_onnx_export(spec: Spec, dataset: dict[str, Any], fit: dict[str, Any]) -> None:
    """Let a worker export the model beside what comes before `publish`, which waits for it; on a cluster elsewhere `publish` starts it."""
    if not in_this_process():  # a job that nobody watches would not stop with its flow
        return
    from ray_jobs import onnx_on_ray

    with ray_cluster.connect():
        onnx_on_ray.start_export(fit["model_uri"], dataset["uri"], spec.storage)


@effect(name="publish", timeout_s=3600, tells=True)
def publish(
    spec: Spec,
    model: dict[str, Any],
    fit: dict[str, Any],
    evaluation: dict[str, Any],
    lineage: dict[str, Any],
    report: str,
    *,
    serves: bool,
) -> dict[str, Any]:
    """Put the version's files on S3, MANIFEST.json last, and read every object back. `report` is the HTML text.

    model.onnx is among them where its answers were verified; a model is published without it rather than not at all. The folder of a
    version that `serves` is left as it is, unless it is damaged: it must never look unfinished, not even for a moment.
    """
    store, uri = object_store(), model["artifact_uri"]
    onnx = _onnx(spec, fit, evaluation)
    transferred = 0
    with progress.step("Publishing to S3") as on_progress:
        if not (serves and _is_sound(store, uri)):
            files = _files(store, fit, evaluation, lineage, onnx) | {"report.html": report.encode("utf-8", "replace")}
            transferred = commit(store, uri, files, on_progress=on_progress).transferred
        problems = verify(store, uri)
        manifest = read_manifest(store, uri)
    if problems or manifest is None:
        raise ServiceError(f"{uri} does not match what was published: {problems}", "The same command publishes again.")
    return {
        "uri": uri,
        "objects": len(manifest.objects),
        "bytes": manifest.size_bytes,
        "verified": True,
        "transferred": transferred,
        "onnx": {key: onnx[key] for key in ("exported", "max_difference", "max_logit_difference", "images", "why")},
    }


def _is_sound(store: ObjectStore, uri: str) -> bool:
    return read_manifest(store, uri) is not None and not verify(store, uri)


def _files(
    store: ObjectStore, fit: dict[str, Any], evaluation: dict[str, Any], lineage: dict[str, Any], onnx: dict[str, Any]
) -> dict[str, Path | bytes]:
    """What is published of a version, by name, but its report."""
    models = settings.cache_dir() / "models"
    folder = fetch(store, fit["model_uri"], models)
    files: dict[str, Path | bytes] = {name: folder / name for name in MODEL_FILES}
    files["evaluation.json"] = json.dumps(evaluation["evaluation"], indent=1).encode()
    files[LINEAGE] = json.dumps(lineage, indent=1).encode()
    if onnx["exported"]:
        files["model.onnx"] = fetch(store, onnx["uri"], models) / "model.onnx"
    return files


def _onnx(spec: Spec, fit: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The verified ONNX file of the model, or why there is none, which is said in a line."""
    dataset_uri = join_uri(spec.storage, "datasets", spec.name, evaluation["holdout"]["version"])
    arguments = {"model_uri": fit["model_uri"], "dataset_uri": dataset_uri, "storage": spec.storage}
    with progress.step("Exporting to ONNX") as on_progress:
        onnx = run_on_ray(step_work.export_onnx, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits))
    if not onnx["exported"]:
        progress.say(f"[yellow]No ONNX file:[/] {escape(onnx['why'])}. The model is published without it.")
    return onnx


@effect(name="look for a finished retraining", timeout_s=300)
def find_finished(spec: Spec, dataset: dict[str, Any], backbones: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the same retraining answered when it last finished, if its version is still registered and published."""
    store = object_store()
    try:
        outcome: dict[str, Any] = json.loads(store.read(_outcome_uri(spec, dataset, backbones)))
    except FileNotFoundError:
        return None
    model = outcome["model"]
    found = registry.get(model["name"], model["version"])
    if (
        found is None
        or found.tags.get("unfreeze.artifact_uri") != model["artifact_uri"]
        or read_manifest(store, model["artifact_uri"]) is None
    ):
        return None
    serving, notes = follow(open_book(spec.name, spec.storage))
    tell(notes)
    return {**outcome, "model": {**model, "champion_version": serving}}


@effect(name="remember the retraining", timeout_s=300)
def remember(spec: Spec, dataset: dict[str, Any], backbones: list[dict[str, Any]], outcome: dict[str, Any]) -> None:
    """Keep what a finished retraining answered: the last write of the flow."""
    object_store().write(_outcome_uri(spec, dataset, backbones), json.dumps(outcome, indent=1).encode())


def _outcome_uri(spec: Spec, dataset: dict[str, Any], backbones: list[dict[str, Any]]) -> str:
    return join_uri(spec.storage, "retrains", spec.name, f"{digest_of([spec.digest, dataset['version'], *digests(backbones)])}.json")
