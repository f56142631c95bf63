"""What a version was made from, kept in its published folder, so that any later command can judge it by its own rules and data."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from infra.committed_folder import MANIFEST, read_manifest
from infra.errors import UserError
from infra.object_store import ObjectStore, join_uri, object_store
from ray_jobs.spec import Spec

LINEAGE = "lineage.json"
JUDGEMENT = "judgement.json"
WEIGHTS = "model.safetensors"
PROJECT = Path(__file__).resolve().parent.parent


def lineage_of(
    spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any], fit: dict[str, Any]
) -> dict[str, Any]:
    """The lineage of the model that a retraining has made.

    `trained_on` lists the datasets whose images the weights have seen: this one's, and those of the published version
    that the backbone's weights came from, if they did.
    """
    return {
        "spec": spec.model_dump(mode="json"),
        "dataset": {key: value for key, value in dataset.items() if key != "seconds"},
        "trained_on": list(dict.fromkeys([dataset["uri"], *_seen_before(object_store(), spec)])),
        "backbone": {"name": backbone["name"], "digest": backbone["digest"]},
        "search_id": search["search_id"],
        "fit_id": fit["fit_id"],
        "probe_uri": fit["probe_model_uri"],
        "code": git_commit() or "unknown",
    }


def read_lineage(store: ObjectStore, artifact_uri: str) -> dict[str, Any] | None:
    """The lineage of a published version; None for one that was published before there was any."""
    try:
        lineage: dict[str, Any] = json.loads(store.read(join_uri(artifact_uri, LINEAGE)))
    except FileNotFoundError:
        return None
    return lineage


def manifest_digest(store: ObjectStore, uri: str) -> str:
    """The sha256 of a folder's manifest: with the manifest's own digests it stands for every byte of the folder."""
    return hashlib.sha256(store.read(join_uri(uri, MANIFEST))).hexdigest()


def weights_digest(store: ObjectStore, uri: str) -> str:
    """The sha256 of a model folder's weights, by its manifest. Raises UserError where the folder was never committed."""
    manifest = read_manifest(store, uri)
    found = next((entry.sha256 for entry in manifest.objects if entry.key == WEIGHTS), None) if manifest else None
    if found is None:
        raise UserError(
            f"There is no published model at {uri}.", "`unfreeze verify` says what is there; `unfreeze retrain` makes a version."
        )
    return found


def git_commit() -> str | None:
    """The commit of this checkout, or None outside a git repository."""
    answer = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _seen_before(store: ObjectStore, spec: Spec) -> list[str]:
    found: list[str] = []
    for backbone in spec.backbones:
        folder, _, name = backbone.weights.rpartition("/")
        if backbone.weights.startswith("s3://") and name:
            found += (read_lineage(store, folder) or {}).get("trained_on", [])
    return found
