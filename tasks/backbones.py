"""The step that puts the pretrained backbone where every worker finds it, named by the digest of its weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from infra import progress, ray_cluster
from infra.object_store import object_store
from ray_jobs.spec import Spec, digest_of
from tasks.policies import step
from tasks.ray_work import in_this_process


def _key(spec: Spec) -> list[Any]:
    backbone, search = spec.backbone, spec.search
    return [
        spec.storage,
        backbone.name,
        _weights_identity(spec),
        spec.data.image_size,
        sorted(search.unfreeze_depth),
        importlib.metadata.version("timm"),
    ]


@step(name="prepare backbone", key=_key, timeout_s=3600)
def prepare_backbone(spec: Spec) -> dict[str, Any]:
    """Check the backbone against the spec and store its weights; its URI, digest, groups and preprocessing."""
    from ray_jobs import backbone_on_ray
    from ray_jobs.workers import take_usage

    with progress.step("Loading the backbone"):
        if not in_this_process():
            return backbone_on_ray.prepare_here(spec)
        with ray_cluster.connect() as cluster:
            found = backbone_on_ray.prepare_backbone(spec, cluster)
            take_usage()
            return found


def digests(backbones: list[dict[str, Any]]) -> list[str]:
    """What names the backbones of a search in keys."""
    return [backbone["digest"] for backbone in backbones]


def which(spec: Spec, backbone: dict[str, Any]) -> str:
    """Which backbone a step works on, for its progress line, where a search has several."""
    return f" of {backbone['name']}" if spec.search.backbone else ""


def _weights_identity(spec: Spec) -> str:
    """Names the content of the weights without loading them."""
    weights = spec.backbone.weights
    if weights == "none":
        return f"none, seed {spec.search.seed}"
    if weights.startswith("package:"):
        name = weights.removeprefix("package:")
        try:
            return f"{weights} {importlib.metadata.version(name.replace('_', '-'))}"
        except importlib.metadata.PackageNotFoundError:
            return weights
    if weights.startswith("s3://"):
        folder = weights.rpartition("/")[0]
        return digest_of([[info.uri, info.etag, info.size_bytes] for info in object_store().list(folder) if info.uri == weights])
    path = Path(weights)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else weights
