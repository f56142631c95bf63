"""Let the workers of a cluster load what every step needs, while the driver still prepares: torch, timm and our own modules."""

from __future__ import annotations

from typing import Any

import ray

from ray_jobs.light_timm import import_timm

MOST_WORKERS = 16


def warm_up() -> None:
    """Start loading in as many workers as run at a time; nobody waits for it."""
    workers = min(MOST_WORKERS, max(1, int(ray.cluster_resources().get("CPU", 1))))  # type: ignore[no-untyped-call]
    task: Any = ray.remote(_load).options(num_cpus=1, name="warm-up")
    for _ in range(workers):
        task.remote()


def _load() -> None:
    import_timm()
    from ray_jobs import backbone, cuts, dataset, feature_cache, features  # noqa: F401
