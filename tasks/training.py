"""The step that fits the winner of the search on Ray Train, with fresh augmentation."""

from __future__ import annotations

from typing import Any

from infra import progress, ray_cluster
from ray_jobs.spec import Spec
from tasks.policies import step


def _key(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any]) -> list[Any]:
    return [
        spec.storage,
        spec.fit.model_dump(mode="json"),
        spec.fit_max_epochs,
        dataset["version"],
        backbone["digest"],
        search["search_id"],
    ]


@step(name="fit", key=_key, timeout_s=48 * 3600)
def fit_winner(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any]) -> dict[str, Any]:
    """The fitted model, or the linear probe where fine-tuning made it worse; its URI and learning curve."""
    from ray_jobs import fit_on_ray

    best = search["best"]
    title = (
        f"Fitting depth {best['unfreeze_depth']}, lr {best['lr']:.2g} on {spec.fit.num_workers} worker{'s' * (spec.fit.num_workers > 1)}"
    )
    with progress.step(title) as on_progress, ray_cluster.connect():
        fit = fit_on_ray.run_fit(spec, dataset, backbone, search, on_progress)
    return {**fit, "uris": [fit["model_uri"], fit["probe_model_uri"]]}
