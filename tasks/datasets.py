"""The step that turns a source of images into a prepared dataset."""

from __future__ import annotations

from typing import Any

from infra import progress
from ray_jobs import sources, step_work
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.policies import step
from tasks.ray_work import in_this_process, run_on_ray


def _key(spec: Spec) -> list[Any]:
    return [spec.name, spec.storage, sources.fingerprint(spec.data, slices=spec.promotion.slices)]


@step(name="prepare data", key=_key, timeout_s=6 * 3600)
def prepare_data(spec: Spec) -> dict[str, Any]:
    """Decode, check, split and store every image; the dataset's version, URI and figures.

    Where the images lie: those of this machine's disk here, those on S3 over the cluster.
    """
    with progress.step("Preparing the data") as on_progress:
        if in_this_process() or spec.data.source.startswith("s3://"):
            arguments = {"spec": spec.model_dump(mode="json")}
            return run_on_ray(
                step_work.prepare_data, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits)
            )
        from ray_jobs import prepare_in_processes

        return prepare_in_processes.prepare(spec, on_progress)
