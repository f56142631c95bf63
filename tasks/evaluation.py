"""The step that scores challenger, champion and probe on the same holdout images."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from infra import progress, ray_cluster
from ray_jobs.spec import Spec
from tasks.policies import step


def _key(spec: Spec, dataset: dict[str, Any], models: dict[str, str]) -> list[Any]:
    return [spec.storage, dataset["version"], models]


@step(name="evaluate", key=_key, timeout_s=6 * 3600)
def evaluate(spec: Spec, dataset: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    """Metrics of each model (`models`: URI of a model folder by role) on the holdout, and the challenger's worst mistakes."""
    from ray_jobs import evaluate_on_ray

    started = datetime.now(UTC)
    with progress.step("Evaluating on the holdout") as on_progress, ray_cluster.connect():
        made = evaluate_on_ray.evaluate(dataset, models, spec.storage, on_progress)
    return {**made, "at": started.isoformat(timespec="seconds")}
