"""The step that runs the frozen prefix once over the images that are new, for every cut that the search needs."""

from __future__ import annotations

from typing import Any

from infra import progress
from ray_jobs import step_work
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.backbones import which
from tasks.policies import effect
from tasks.ray_work import run_on_ray


def together(features: list[dict[str, Any]]) -> dict[str, Any]:
    """What the features of all backbones took; the images computed are the most that any of them missed."""
    return {
        "computed_images": max(one["computed_images"] for one in features),
        "seconds": sum(one["seconds"] for one in features),
        "bytes": sum(one["bytes"] for one in features),
    }


@effect(name="cache features", timeout_s=12 * 3600, tells=True)
def cache_features(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The URI of the cached features of each cut that the plan starts from, and how many images had to be computed.

    An effect, not a step: it looks itself at what is cached, checks every byte of this machine's copy, and mends what is damaged.
    """
    cuts = sorted(set(plan["source"].values()))
    arguments = {"spec": spec.model_dump(mode="json"), "dataset": dataset, "backbone": backbone, "depths": cuts}
    with progress.step(f"Computing the shared features{which(spec, backbone)}") as on_progress:
        return run_on_ray(
            step_work.cache_features, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits)
        )
