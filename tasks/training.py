"""The step that fits the winner of the search on Ray Train, with fresh augmentation."""

from __future__ import annotations

from typing import Any

from infra import progress
from ray_jobs import step_work
from ray_jobs.fit_choice import CHOICE_CODE_VERSION
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.policies import step
from tasks.ray_work import run_on_ray


def _key(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any]) -> list[Any]:
    return [
        spec.storage,
        spec.fit.model_dump(mode="json"),
        spec.fit_max_epochs,
        dataset["version"],
        backbone["digest"],
        search["search_id"],
        CHOICE_CODE_VERSION,
    ]


@step(name="fit", key=_key, timeout_s=48 * 3600)
def fit_winner(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any]) -> dict[str, Any]:
    """The fitted model, or the linear probe where fine-tuning made it worse; its URI and learning curve."""
    best = search["best"]
    title = (
        f"Fitting depth {best['unfreeze_depth']}, lr {best['lr']:.2g} on {spec.fit.num_workers} worker{'s' * (spec.fit.num_workers > 1)}"
    )
    arguments = {"spec": spec.model_dump(mode="json"), "dataset": dataset, "backbone": backbone, "search": search}
    with progress.step(title) as on_progress:
        fit = run_on_ray(step_work.run_fit, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits))
    return {**fit, "uris": [fit["model_uri"], fit["probe_model_uri"]]}
