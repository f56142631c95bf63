"""The step that turns a source of images into a prepared dataset."""

from __future__ import annotations

from typing import Any

from infra import progress, ray_cluster
from ray_jobs import sources
from ray_jobs.spec import Spec
from tasks.policies import step


def _key(spec: Spec) -> list[Any]:
    return [spec.name, spec.storage, sources.fingerprint(spec.data, slices=spec.promotion.slices)]


@step(name="prepare data", key=_key, timeout_s=6 * 3600)
def prepare_data(spec: Spec) -> dict[str, Any]:
    """Decode, check, split and store every image; the dataset's version, URI and figures."""
    from ray_jobs import prepare_on_ray

    with progress.step("Preparing the data") as on_progress, ray_cluster.connect():
        return prepare_on_ray.prepare(spec, on_progress)
