"""The step that runs the frozen prefix once over the images that are new, for every cut that the search needs."""

from __future__ import annotations

from typing import Any

from infra import progress, ray_cluster
from ray_jobs.spec import Spec
from tasks.policies import effect


@effect(name="cache features", timeout_s=12 * 3600)
def cache_features(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The URI of the cached features of each cut that the plan starts from, and how many images had to be computed.

    An effect, not a step: it looks itself at what is cached, checks every byte of this machine's copy, and mends what is damaged.
    """
    from ray_jobs import features_on_ray

    cuts = sorted(set(plan["source"].values()))
    with progress.step("Computing the shared features") as on_progress, ray_cluster.connect():
        return features_on_ray.cache_features(spec, dataset, backbone, on_progress, depths=cuts, say=progress.say)
