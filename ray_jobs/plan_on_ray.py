"""Calibrate on a worker of a Ray cluster, and plan a search from it. Kept by backbone, image size and kind of machine."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import ray

from infra.committed_folder import fetch
from infra.object_store import join_uri, object_store
from infra.settings import cache_dir
from ray_jobs.features_on_ray import num_groups_of, result_of
from ray_jobs.light_timm import import_timm
from ray_jobs.plan import Calibration, Workload, expected_epochs, steady_plan
from ray_jobs.search_space import backbone_in_points, probe_learning_rates, trial_configs
from ray_jobs.spec import Spec, digest_of
from ray_jobs.workers import submit

CALIBRATION_VERSION = 1
"""Raise it whenever the code measures something else, or computes it faster."""
SAMPLE = 32


@dataclass(frozen=True)
class _Job:
    """What the calibrating task must know; plain values."""

    folder_uri: str
    dataset_uri: str
    backbone_uri: str
    backbone_digest: str
    depths: tuple[int, ...]
    image_size: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def plan_search(
    spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], *, views: int = 1, memory_bytes: float | None = None
) -> dict[str, Any]:
    """The plan for one backbone of the search, as plain values.

    The first search of a backbone on a kind of machine measures for a second or two, later ones nothing.
    """
    trials = trials_by_depth(spec, backbone)
    job = _Job(
        join_uri(spec.storage, "calibrations"), dataset["uri"], backbone["uri"], backbone["digest"], tuple(sorted(trials)),
        spec.data.image_size, round(spec.data.max_megapixels * 1e6), tuple(backbone["mean"]), tuple(backbone["std"]),
    )  # fmt: skip
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    reference = submit(_calibrate, job, name="calibrate", resources={"cpu": 1, "gpu": min(1, gpus)})
    measured = Calibration.from_plain(result_of(reference))
    started = time.perf_counter()
    epochs = expected_epochs(spec.search.scheduler, spec.search.max_epochs, sum(trials.values()))
    workers = gpus or max(1, int(resources.get("CPU", 1)))
    work = Workload(trials, epochs, dataset["train"], dataset["val"], views, workers)
    found = steady_plan(measured, work, memory_bytes or float("inf"))
    return {
        "materialise": list(found.materialise), "source": {str(depth): source for depth, source in found.source.items()},
        "estimated_s": found.estimated_s, "prefix_s": found.prefix_s, "trials_s": found.trials_s, "memory_bytes": found.memory_bytes,
        "workers": workers, "expected_epochs": epochs, "planning_s": time.perf_counter() - started, "calibration": measured.to_plain(),
    }  # fmt: skip


def trials_by_depth(spec: Spec, backbone: dict[str, Any]) -> dict[int, int]:
    """A backbone's trials by depth, the probes among those of depth 0."""
    search, num_groups = spec.search, num_groups_of(backbone)
    if search.resolved_searcher == "optuna":  # chooses as it goes: take equal shares
        shares = len(search.unfreeze_depth) * len(spec.backbones)
        counts = Counter({depth: max(1, search.num_trials // shares) for depth in search.unfreeze_depth})
    else:
        name = backbone_in_points(spec, backbone["name"])
        counts = Counter(config.unfreeze_depth for config in trial_configs(search) if config.backbone == name)
    counts[0] += len(probe_learning_rates(search.lr))
    return {min(depth, num_groups): count for depth, count in counts.items()}


def _calibrate(job: _Job) -> dict[str, Any]:
    """One task: what an earlier one measured on such a machine, or a measurement now."""
    store = object_store()
    uri = join_uri(job.folder_uri, f"{_key(job)}.json")
    try:
        return dict(json.loads(store.read(uri)))
    except FileNotFoundError:
        pass
    import_timm()
    import torch

    from ray_jobs import backbone
    from ray_jobs.calibrate import calibrate
    from ray_jobs.dataset import open_dataset

    torch.set_num_threads(1)
    dataset = open_dataset(job.dataset_uri, store, cache_dir() / "datasets")
    images = list(dataset.image_bytes(0, min(SAMPLE, len(dataset.all_rows))))
    folder = fetch(store, job.backbone_uri, cache_dir() / "backbones")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = backbone.load(folder, num_classes=len({row.label_index for row in dataset.all_rows}), seed=0).to(device)
    measured = calibrate(
        model.to(memory_format=torch.channels_last), images, job.depths, image_size=job.image_size, max_pixels=job.max_pixels,
        mean=job.mean, std=job.std, folder=cache_dir(),
    ).to_plain()  # fmt: skip
    store.write(uri, json.dumps(measured, indent=1).encode())
    return measured


def _key(job: _Job) -> str:
    """Everything that the figures depend on, but the images and where things lie."""
    import psutil

    same = {key: value for key, value in asdict(job).items() if not key.endswith("_uri")}
    return digest_of({"version": CALIBRATION_VERSION, "machine": [_processor(), psutil.cpu_count(), _accelerator()], **same})


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def _accelerator() -> str:
    """The kinds of GPU on this node as Ray names them; none where the task was lent none."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return ""
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)  # type: ignore[no-untyped-call]
    return ",".join(sorted(key for key in resources if key.startswith("accelerator_type:")))
