"""The step that runs the frozen prefix once over the data, for every cut that the search needs."""

from __future__ import annotations

from typing import Any

from infra import progress, ray_cluster
from ray_jobs.spec import Spec
from tasks.policies import step


def _key(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any]) -> list[Any]:
    return [spec.storage, dataset["version"], backbone["digest"], sorted(spec.search.unfreeze_depth), spec.data.image_size]


@step(name="cache features", key=_key, timeout_s=12 * 3600)
def cache_features(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
    """The URI of the cached features by depth, and how many images had to be computed."""
    from ray_jobs import features_on_ray

    with progress.step("Computing the shared features") as on_progress, ray_cluster.connect():
        made = features_on_ray.cache_features(spec, dataset, backbone, on_progress)
    return {**made, "uris": sorted(made["features"].values())}
