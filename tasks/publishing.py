"""The steps that publish an accepted version to S3, and that remember a finished retraining so that the next one can skip."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from infra import progress, registry, settings
from infra.committed_folder import commit, fetch, read_manifest, verify
from infra.errors import ServiceError
from infra.object_store import ObjectStore, join_uri, object_store
from ray_jobs.spec import Spec, digest_of
from tasks.backbones import digests
from tasks.lineage import LINEAGE
from tasks.policies import effect

MODEL_FILES = ("model.safetensors", "config.json", "labels.json", "preprocessing.json")


@effect(name="publish", timeout_s=3600)
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

    The folder of a version that `serves` is left as it is, unless it is damaged: it must never look unfinished, not even for a moment.
    """
    started = time.monotonic()
    store, uri = object_store(), model["artifact_uri"]
    with progress.step("Publishing to S3") as on_progress:
        transferred = 0
        if not (serves and _is_sound(store, uri)):
            folder = fetch(store, fit["model_uri"], settings.cache_dir() / "models")
            files: dict[str, Path | bytes] = {name: folder / name for name in MODEL_FILES}
            files["evaluation.json"] = json.dumps(evaluation["evaluation"], indent=1).encode()
            files[LINEAGE] = json.dumps(lineage, indent=1).encode()
            files["report.html"] = report.encode("utf-8", "replace")
            transferred = commit(store, uri, files, on_progress=on_progress).transferred
        problems = verify(store, uri)
    if problems:
        raise ServiceError(f"{uri} does not match what was published: {problems}", "The same command publishes again.")
    manifest = read_manifest(store, uri)
    assert manifest is not None
    return {
        "uri": uri,
        "objects": len(manifest.objects),
        "bytes": manifest.size_bytes,
        "verified": True,
        "transferred": transferred,
        "seconds": time.monotonic() - started,
    }


def _is_sound(store: ObjectStore, uri: str) -> bool:
    return read_manifest(store, uri) is not None and not verify(store, uri)


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
    champion = registry.champion(model["name"])
    return {**outcome, "model": {**model, "champion_version": champion.version if champion else None}}


@effect(name="remember the retraining", timeout_s=300)
def remember(spec: Spec, dataset: dict[str, Any], backbones: list[dict[str, Any]], outcome: dict[str, Any]) -> None:
    """Keep what a finished retraining answered: the last write of the flow."""
    object_store().write(_outcome_uri(spec, dataset, backbones), json.dumps(outcome, indent=1).encode())


def _outcome_uri(spec: Spec, dataset: dict[str, Any], backbones: list[dict[str, Any]]) -> str:
    return join_uri(spec.storage, "retrains", spec.name, f"{digest_of([spec.digest, dataset['version'], *digests(backbones)])}.json")
