"""The step that scores challenger, champion and probe on the same holdout images."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from infra import progress
from ray_jobs import step_work
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.policies import step
from tasks.ray_work import run_on_ray


def _key(spec: Spec, dataset: dict[str, Any], models: dict[str, str]) -> list[Any]:
    return [spec.storage, dataset["version"], models]


@step(name="evaluate", key=_key, timeout_s=6 * 3600)
def evaluate(spec: Spec, dataset: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    """Metrics of each model (`models`: URI of a model folder by role) on the holdout, and the challenger's worst mistakes."""
    started = datetime.now(UTC)
    arguments = {"dataset": dataset, "models": models, "storage": spec.storage}
    with progress.step("Evaluating on the holdout") as on_progress:
        made = run_on_ray(step_work.evaluate, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits))
    return {**made, "at": started.isoformat(timespec="seconds")}
