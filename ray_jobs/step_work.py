"""What each step asks of a cluster, as functions of plain values: the same in the step's own process and in a job (`ray_jobs/job.py`).

They run with a connection to Ray. What they need is imported inside, so that a caller that only submits them loads none of it.
"""

from __future__ import annotations

from typing import Any

from ray_jobs.search_space import TrialConfig
from ray_jobs.spec_file import parse_spec
from ray_jobs.watch import Watch

Plain = dict[str, Any]


def prepare_data(watch: Watch, *, spec: Plain) -> Plain:
    """Decode, check, split and store every image."""
    from ray_jobs import prepare_on_ray

    return prepare_on_ray.prepare(parse_spec(spec), watch.on_progress)


def plan_search(_watch: Watch, *, spec: Plain, dataset: Plain, backbone: Plain) -> Plain:
    """Measure the machine, and plan the search."""
    from ray_jobs import plan_on_ray

    parsed = parse_spec(spec)
    return plan_on_ray.plan_search(parsed, dataset, backbone, views=parsed.search.views)


def cache_features(watch: Watch, *, spec: Plain, dataset: Plain, backbone: Plain, depths: list[int]) -> Plain:
    """Compute what is missing of the features at these cuts."""
    from ray_jobs import features_on_ray

    return features_on_ray.cache_features(parse_spec(spec), dataset, backbone, watch.on_progress, depths=depths, say=watch.say)


def run_search(
    watch: Watch, *, spec: Plain, dataset: Plain, backbones: list[Plain], features: list[Plain], sources: list[Plain], warm: list[Plain],
    fits: bool,
) -> Plain:  # fmt: skip
    """Search, from cached features."""
    from ray_jobs import search_on_ray

    again = [TrialConfig(**point) for point in warm]
    return search_on_ray.run_search(
        parse_spec(spec), dataset, backbones, features, watch.on_progress, sources=sources, warm=again, fits=fits
    )  # fmt: skip


def run_fit(watch: Watch, *, spec: Plain, dataset: Plain, backbone: Plain, search: Plain) -> Plain:
    """Fit the winner of a search."""
    from ray_jobs import fit_on_ray

    return fit_on_ray.run_fit(parse_spec(spec), dataset, backbone, search, watch)


def evaluate(watch: Watch, *, dataset: Plain, models: dict[str, str], storage: str) -> Plain:
    """Score models on the holdout."""
    from ray_jobs import evaluate_on_ray

    return evaluate_on_ray.evaluate(dataset, models, storage, watch.on_progress)


def export_onnx(_watch: Watch, *, model_uri: str, dataset_uri: str, storage: str) -> Plain:
    """Export a model and verify its answers."""
    from ray_jobs import onnx_on_ray

    return onnx_on_ray.export(model_uri, dataset_uri, storage)
