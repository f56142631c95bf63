"""Fill the feature cache for a search on a Ray cluster: one forward pass over the images that any wanted cut or view misses."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from infra import lease
from infra.committed_folder import fetch
from infra.errors import UnfreezeError
from infra.in_threads import in_threads
from infra.object_store import ObjectStore, join_uri, object_store
from infra.settings import cache_bytes, cache_dir
from ray_jobs.feature_batches import (
    THREADS,
    Batch,
    DamagedError,
    Part,
    batch_uri,
    commit_batch,
    commit_selection,
    drop,
    find_batches,
    write_shards,
)
from ray_jobs.feature_cache import Features, open_features
from ray_jobs.feature_lookup import Wanted, selection_of, work_of
from ray_jobs.feature_set import Cell, FeatureSet, Transform, cells_of, feature_set
from ray_jobs.light_timm import import_timm
from ray_jobs.spec import Augmentation, Spec, digest_of
from ray_jobs.workers import submit

if TYPE_CHECKING:
    from infra.progress import OnProgress  # it loads rich, which workers do without
    from ray_jobs.features import FrozenPrefix

ROWS_A_TASK, MIN_ROWS_A_TASK = 256, 16
ATTEMPTS = 4
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """What all tasks of one pass share."""

    dataset_uri: str
    backbone_uri: str
    transform: Transform
    max_pixels: int
    num_groups: int
    augmentation: Augmentation
    dtype: str


@dataclass(frozen=True)
class _Request:
    """What a search asks the cache for."""

    store: ObjectStore
    storage: str
    sets: Mapping[Cell, FeatureSet]
    wanted: Wanted
    about: Mapping[str, Any]
    job: _Job
    say: Say


def num_groups_of(backbone: dict[str, Any]) -> int:
    """The number of groups, from a backbone's record or from its config.json, which lists their names."""
    groups = backbone["groups"]
    return groups if isinstance(groups, int) else len(groups)


def cache_features(
    spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], on_progress: OnProgress, *, depths: Sequence[int] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Compute and commit what is missing of the features of `depths` (by default the spec's, and 0 for the probe), and map it here.

    Gives the URI to open by depth, the batches behind them, the images computed, and seconds and bytes of all.
    """
    started = time.perf_counter()
    request = _request(spec, dataset, backbone, depths, say)
    computed: set[int] = set()
    for attempt in itertools.count(1):
        try:
            batches = _complete(request, computed, on_progress)
            uris = _select(request, batches)
            opened = _open(request, list(uris.values()))
            break
        except DamagedError as error:
            _drop(request, error)
            if attempt == ATTEMPTS:
                raise
    for digest in {features.digest for features in request.sets.values()}:
        request.store.write(join_uri(request.storage, "uses", "features", digest), b"{}")  # its time stamp is what counts
    return {
        "features": {str(depth): uri for depth, uri in uris.items()}, "computed_images": len(computed),
        "batches": sorted({batch.uri for found in batches.values() for batch in found}),
        "seconds": time.perf_counter() - started, "bytes": sum(features.size_bytes for features in opened),
    }  # fmt: skip


def _request(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], depths: Sequence[int] | None, say: Say) -> _Request:
    from ray_jobs.dataset import open_dataset

    store, num_groups = object_store(), num_groups_of(backbone)
    transform = Transform(spec.data.image_size, tuple(backbone["mean"]), tuple(backbone["std"]))
    augmentation, dtype = spec.fit.augmentation, spec.search.feature_dtype
    cells = cells_of(depths if depths is not None else {0, *spec.search.unfreeze_depth}, spec.search.views)
    make = functools.partial(
        feature_set, backbone_digest=backbone["digest"], num_groups=num_groups, transform=transform, augmentation=augmentation, dtype=dtype,
    )  # fmt: skip
    rows = open_dataset(dataset["uri"], store, cache_dir() / "datasets").rows(["train", "val"])
    wanted = Wanted([row.sha256 for row in rows], [row.label_index for row in rows], dataset["train"], spec.search.views)
    max_pixels = round(spec.data.max_megapixels * 1e6)
    job = _Job(dataset["uri"], backbone["uri"], transform, max_pixels, num_groups, augmentation, dtype)
    return _Request(store, spec.storage, {cell: make(cell) for cell in cells}, wanted, {"backbone": backbone.get("name")}, job, say)


def _find(request: _Request) -> dict[Cell, list[Batch]]:
    """The good batches of every cell; damaged ones are dropped."""
    drop_it = functools.partial(_drop, request)
    found = in_threads(lambda features: find_batches(request.store, request.storage, features, drop_it), request.sets.values(), THREADS)
    return dict(zip(request.sets, found, strict=True))


def _drop(request: _Request, error: DamagedError) -> None:
    request.say(f"{error.what} Their images are computed anew.")
    drop(request.store, error.uri)


def _complete(request: _Request, computed: set[int], on_progress: OnProgress) -> dict[Cell, list[Batch]]:
    """All batches that the search needs, those that are missing made now; whoever makes them has the lease."""
    batches = _find(request)
    if not work_of(request.wanted, batches):
        return batches
    job = request.job
    family = digest_of([job.backbone_uri, vars(job.transform), job.dtype])

    def on_wait(holder: lease.Holder) -> None:
        request.say(f"Waiting since {time.strftime('%H:%M:%S')} for {holder}, which computes features of the same backbone.")

    with lease.hold(request.store, join_uri(request.storage, "leases", "features", family), on_wait):
        batches = _find(request)  # whoever was waited for may have made them
        work = work_of(request.wanted, batches)
        computed.update(itertools.chain.from_iterable(work.values()))
        made = _compute(request, work, on_progress)
        return {cell: [*found, *made.get(cell, [])] for cell, found in batches.items()}


def _compute(request: _Request, work: Mapping[tuple[Cell, ...], list[int]], on_progress: OnProgress) -> dict[Cell, list[Batch]]:
    """One pass over the images of `work` (by the cells they miss), then a new batch for each cell."""
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))  # type: ignore[no-untyped-call]
    images = {cell: [request.wanted.images[i] for cells, rows in work.items() if cell in cells for i in rows] for cell in request.sets}
    uris = {cell: batch_uri(request.storage, request.sets[cell], images[cell]) for cell in request.sets if images[cell]}
    resources = {"cpu": 1, "gpu": min(1, gpus)}
    waiting: dict[Any, tuple[int, int]] = {}
    numbers = itertools.count()
    for cells, rows in work.items():
        targets = tuple((cell, uris[cell]) for cell in cells)
        for some in _shares(rows, gpus or cpus or 1):
            number = next(numbers)
            reference = submit(_compute_rows, request.job, number, targets, some, name="features", resources=resources)
            waiting[reference] = (number, len(some))
    parts: dict[Cell, dict[int, list[Part]]] = defaultdict(dict)
    done, total = 0, sum(count for _, count in waiting.values())
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            number, count = waiting[ready]
            for cell, written in result_of(ready).items():
                parts[cell][number] = written
            del waiting[ready]
            done += count
            on_progress(done, total)
    finally:
        for reference in waiting:  # after an error the rest is of no use
            ray.cancel(reference)

    def commit(cell: Cell) -> Batch:
        in_order = [part for _, written in sorted(parts[cell].items()) for part in written]
        about = {**request.about, "kind": "batch", "set": request.sets[cell].plain}
        return commit_batch(request.store, uris[cell], images[cell], in_order, about)

    return {cell: [batch] for cell, batch in zip(uris, in_threads(commit, uris, THREADS), strict=True)}


def _shares(rows: Sequence[int], workers: int) -> list[list[int]]:
    """The rows of one pass in equal tasks of at most 256, as many as keep all workers busy to the end."""
    count = workers * math.ceil(len(rows) / (ROWS_A_TASK * workers))
    count = max(1, min(count, len(rows) // MIN_ROWS_A_TASK))
    bounds = [len(rows) * i // count for i in range(count + 1)]
    return [list(rows[start:stop]) for start, stop in itertools.pairwise(bounds)]


def result_of(reference: Any) -> Any:
    """What a task gave; an error of ours comes back as itself."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnfreezeError):
            raise error.cause from None
        raise


def _select(request: _Request, batches: Mapping[Cell, list[Batch]]) -> dict[int, str]:
    """A selection a depth, committed; their URIs."""
    by_depth: dict[int, list[list[Batch]]] = {}
    for cell, found in batches.items():  # in order of view
        by_depth.setdefault(cell.depth, []).append(found)

    def commit(depth: int) -> str:
        about = {**request.about, "sets": [request.sets[cell].digest for cell in batches if cell.depth == depth]}
        return commit_selection(request.store, request.storage, selection_of(request.wanted, by_depth[depth]), about)

    return dict(zip(by_depth, in_threads(commit, by_depth, THREADS), strict=True))


def _open(request: _Request, uris: Sequence[str]) -> list[Features]:
    """Map the features on this machine, which also checks every byte of them."""
    opened = list(in_threads(lambda uri: open_features(uri, request.store, cache_dir()), uris, THREADS))
    size_bytes, budget = sum(features.size_bytes for features in opened), cache_bytes()
    if size_bytes > budget:
        request.say(f"This search's features ({size_bytes / 1e9:.1f} GB) are larger than UNFREEZE_CACHE_BYTES ({budget / 1e9:.1f} GB).")
    return opened


def _compute_rows(job: _Job, number: int, targets: Sequence[tuple[Cell, str]], rows: list[int]) -> dict[Cell, list[Part]]:
    """One task: these rows of the dataset, for every cell that misses them, written as shards of number `number`."""
    import_timm()
    import torch

    from ray_jobs.dataset import open_dataset
    from ray_jobs.features import features_of, views_of

    torch.set_num_threads(1)
    store, transform = object_store(), job.transform
    dataset = open_dataset(job.dataset_uri, store, cache_dir() / "datasets")
    images = list(zip((dataset.all_rows[i].sha256 for i in rows), dataset.image_bytes_at(rows), strict=True))
    views = sorted({cell.view for cell, _ in targets})
    pixels = views_of(images, views, image_size=transform.image_size, max_pixels=job.max_pixels, augmentation=job.augmentation)
    parts: dict[Cell, list[Part]] = {}
    for view in views:
        uris = {cell.depth: (cell, uri) for cell, uri in targets if cell.view == view}
        seen_NHWC = pixels.pop(view)
        prefix = _prefix(job.backbone_uri, tuple(depth for depth in uris if depth < job.num_groups), transform.image_size)
        found = features_of(prefix, seen_NHWC, depths=list(uris), mean=transform.mean, std=transform.std)
        for depth, (cell, uri) in uris.items():
            parts[cell] = write_shards(store, uri, number, found[depth], job.dtype)
    return parts


@functools.lru_cache(maxsize=2)
def _prefix(backbone_uri: str, depths: Sequence[int], image_size: int) -> FrozenPrefix | None:
    """The traced model, kept by the worker from one task to the next."""
    import torch

    from ray_jobs import backbone
    from ray_jobs.cuts import Cuts
    from ray_jobs.features import FrozenPrefix

    if not depths:
        return None
    folder = fetch(object_store(), backbone_uri, cache_dir() / "backbones")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # any number of classes will do: the classifier is in no prefix
    model = backbone.load(folder, num_classes=2, seed=0).to(device).to(memory_format=torch.channels_last)
    return FrozenPrefix(Cuts(model, depths, image_size))
