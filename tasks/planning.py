"""The step that measures the machine for a moment and plans the search: what to keep of the prefix, and how long it will take."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from infra import progress
from ray_jobs import step_work
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from tasks.backbones import which
from tasks.policies import step
from tasks.ray_work import in_this_process, run_on_ray


def _key(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any]) -> list[Any]:
    counts = [dataset["train"], dataset["val"]]
    return [spec.storage, spec.search.content, dataset["version"], counts, backbone["digest"], spec.data.image_size]


PLANNED = ("materialise", "source", "estimated_s", "prefix_s", "trials_s", "memory_bytes", "workers", "expected_epochs")
SUMMED = ("estimated_s", "prefix_s", "trials_s", "memory_bytes")


def whole_plan(backbones: list[dict[str, Any]], plans: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plans of the backbones come to: one alone as it is; of several the sums, with the cuts of each under its name."""
    shared = {key: plans[0][key] for key in PLANNED}
    if len(plans) == 1:
        return shared
    names = [backbone["name"] for backbone in backbones]
    cuts = {key: dict(zip(names, (plan[key] for plan in plans), strict=True)) for key in ("materialise", "source")}
    return {**shared, **{key: sum(plan[key] for plan in plans) for key in SUMMED}, **cuts}


@step(name="plan search", key=_key, timeout_s=3600)
def plan_search(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
    """For one backbone: the cuts to materialise, where each depth starts from, and the estimate of time and memory."""
    if spec.search.needs_tune and in_this_process():  # it takes seconds to load, and is needed next, while this process only waits here
        threading.Thread(target=importlib.import_module, args=("ray.tune",), daemon=True).start()
    with progress.step(f"Planning the search{which(spec, backbone)}") as on_progress:
        arguments = {"spec": spec.model_dump(mode="json"), "dataset": dataset, "backbone": backbone}
        return run_on_ray(step_work.plan_search, arguments, storage=spec.storage, watch=Watch(on_progress, progress.say, on_progress.waits))
