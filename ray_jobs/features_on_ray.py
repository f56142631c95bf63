"""Fill the feature caches of a search on a Ray cluster: one forward pass over train and val images, all missing cuts at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from infra.committed_folder import Entry, fetch, read_manifest
from infra.errors import UnfreezeError
from infra.object_store import join_uri, object_store
from infra.progress import OnProgress
from infra.settings import cache_dir
from ray_jobs.feature_cache import FeatureIdentity, commit_features, write_shard
from ray_jobs.light_timm import import_timm
from ray_jobs.spec import Spec

if TYPE_CHECKING:
    from ray_jobs.cuts import Cuts

ROWS_A_SHARD = 256
"""A task's share: about a second of work, and the same on every cluster, so that two of them write the same shards."""


@dataclass(frozen=True)
class _Job:
    """What all tasks of one pass share."""

    dataset_uri: str
    backbone_uri: str
    image_size: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_groups: int
    folders: tuple[tuple[int, str], ...]
    """(depth, URI of its cache) of the missing cuts."""


def num_groups_of(backbone: dict[str, Any]) -> int:
    """The number of groups, from a backbone's record or from its config.json, which lists their names."""
    groups = backbone["groups"]
    return groups if isinstance(groups, int) else len(groups)


def feature_folders(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any]) -> dict[int, str]:
    """Where the cache of each depth that the search needs lies: those of the spec, and 0 for the probe."""
    depths = sorted({0, *spec.search.unfreeze_depth})
    identities = {
        depth: FeatureIdentity(
            backbone["digest"], depth, spec.data.image_size, tuple(backbone["mean"]), tuple(backbone["std"]), dataset["version"],
        )
        for depth in depths
    }  # fmt: skip
    return {depth: join_uri(spec.storage, "features", identity.key) for depth, identity in identities.items()}


def cache_features(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Compute and commit the caches that are missing. Gives their URIs by depth, the images computed, seconds and bytes of all."""
    started, store = time.perf_counter(), object_store()
    folders = feature_folders(spec, dataset, backbone)
    missing = {depth: uri for depth, uri in folders.items() if read_manifest(store, uri) is None}
    images = dataset["train"] + dataset["val"]
    if missing:
        job = _Job(
            dataset["uri"], backbone["uri"], spec.data.image_size, round(spec.data.max_megapixels * 1e6), tuple(backbone["mean"]),
            tuple(backbone["std"]), num_groups_of(backbone), tuple(sorted(missing.items())),
        )  # fmt: skip
        entries = _compute(job, images, on_progress)
        for depth, uri in missing.items():
            config = {"depth": depth, "rows": images, "train": dataset["train"], "val": dataset["val"], "image_size": spec.data.image_size,
                      "backbone": backbone["digest"], "dataset": dataset["version"]}  # fmt: skip
            commit_features(store, uri, entries[depth], config)
    sizes = [manifest.size_bytes for uri in folders.values() if (manifest := read_manifest(store, uri))]
    return {
        "features": {str(depth): uri for depth, uri in folders.items()}, "computed_images": images if missing else 0,
        "seconds": time.perf_counter() - started, "bytes": sum(sizes),
    }  # fmt: skip


def _compute(job: _Job, images: int, on_progress: OnProgress) -> dict[int, list[Entry]]:
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0  # type: ignore[no-untyped-call]
    task: Any = ray.remote(_compute_range).options(num_cpus=1, num_gpus=gpus, name="features")
    count = math.ceil(images / ROWS_A_SHARD)
    bounds = [images * i // count for i in range(count + 1)]
    waiting = {task.remote(job, i, bounds[i], bounds[i + 1]): bounds[i + 1] - bounds[i] for i in range(count)}
    entries: dict[int, list[Entry]] = {depth: [] for depth, _ in job.folders}
    done = 0
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            for depth, entry in result_of(ready).items():
                entries[depth].append(entry)
            done += waiting.pop(ready)
            on_progress(done, images)
    finally:
        for reference in waiting:  # after an error the rest is of no use
            ray.cancel(reference)
    return {depth: sorted(found, key=lambda e: e.key) for depth, found in entries.items()}


def result_of(reference: Any) -> Any:
    """What a task gave; an error of ours comes back as itself."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnfreezeError):
            raise error.cause from None
        raise


def _compute_range(job: _Job, index: int, start: int, stop: int) -> dict[int, Entry]:
    """One task: the rows start..stop of every missing cut, written as shard `index` of each."""
    import_timm()
    import numpy as np
    import torch

    from ray_jobs.dataset import open_dataset
    from ray_jobs.features import features_of, pixels_of

    torch.set_num_threads(1)
    store = object_store()
    dataset = open_dataset(job.dataset_uri, store, cache_dir() / "datasets")
    pixels_NHWC = pixels_of(dataset.image_bytes(start, stop), image_size=job.image_size, max_pixels=job.max_pixels)
    labels = np.array([row.label_index for row in dataset.all_rows[start:stop]], dtype=np.int64)
    folders = dict(job.folders)
    cuts = _cuts(job.backbone_uri, tuple(depth for depth in folders if depth < job.num_groups), job.image_size)
    found = features_of(cuts, pixels_NHWC, depths=list(folders), mean=job.mean, std=job.std)
    return {depth: write_shard(store, uri, index, found[depth], labels) for depth, uri in folders.items()}


@functools.lru_cache(maxsize=1)
def _cuts(backbone_uri: str, depths: Sequence[int], image_size: int) -> Cuts | None:
    """The traced model, kept by the worker from one task to the next."""
    import torch

    from ray_jobs import backbone
    from ray_jobs.cuts import Cuts

    if not depths:
        return None
    folder = fetch(object_store(), backbone_uri, cache_dir() / "backbones")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # any number of classes will do: the classifier is in no prefix
    model = backbone.load(folder, num_classes=2, seed=0).to(device).to(memory_format=torch.channels_last)
    return Cuts(model, depths, image_size)
