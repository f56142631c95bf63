"""The evaluation on Ray: every model on the same holdout images, split into tasks by image range and image size.

The result is a committed folder evaluations/DIGEST/ (evaluation.json and a Parquet file of predictions a model), named by
its inputs, so the same evaluation is never computed twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from infra.committed_folder import commit, fetch, read_manifest
from infra.errors import UnfreezeError, UserError
from infra.object_store import ObjectStore, join_uri, object_store
from infra.settings import cache_dir
from ray_jobs.dataset import open_dataset
from ray_jobs.light_timm import import_timm
from ray_jobs.metrics import measure
from ray_jobs.spec import digest_of
from ray_jobs.workers import submit

EVALUATION_CODE_VERSION = 2
"""Raise it when the same models and images would be measured otherwise."""

IMAGES_PER_TASK = 256  # fewer are not worth a process that has to load torch
MISTAKES = 24
RESULT = "evaluation.json"

OnProgress = Callable[[float, float], None]


@dataclass(frozen=True)
class _Model:
    """One distinct model: where it is, what it knows, and the side of the images it sees."""

    uri: str
    labels: list[str]
    image_size: int


def evaluate(dataset: dict[str, Any], models: dict[str, str], storage: str, on_progress: OnProgress) -> dict[str, Any]:
    """Judge every model (name -> address of its folder) on the dataset's holdout; equal models are scored once."""
    store = object_store()
    digests = {name: _digest(store, uri) for name, uri in models.items()}
    key = digest_of({"dataset": dataset["version"], "models": digests, "code": EVALUATION_CODE_VERSION})
    uri = join_uri(storage, "evaluations", key)
    if read_manifest(store, uri) is None:
        distinct = {digests[name]: _describe(store, models[name]) for name in models}
        scores = _score(dataset, distinct, on_progress)
        result, files = _summarise(store, dataset, distinct, scores, digests)
        result |= {"uri": uri, "predictions": {name: join_uri(uri, f"{name}.parquet") for name in models}}
        commit(store, uri, {RESULT: json.dumps(result, indent=1).encode(), **files})
    on_progress(dataset["holdout"], dataset["holdout"])
    done: dict[str, Any] = json.loads(store.read(join_uri(uri, RESULT)))
    return done


def _digest(store: ObjectStore, uri: str) -> str:
    """A model by its weights, labels and preprocessing: the same model under two addresses is one."""
    try:
        manifest = read_manifest(store, uri)
    except ValueError as error:
        raise UserError(f"The manifest of the model at {uri} is damaged: {error}", "Publish it again, or judge another version.") from None
    if manifest is None:
        raise UserError(f"There is no committed model at {uri}.", "Check the address; `unfreeze verify` says what is there.")
    parts = ("model.safetensors", "labels.json", "preprocessing.json")
    return hashlib.sha256("".join(f"{e.key}:{e.sha256}\n" for e in manifest.objects if e.key in parts).encode()).hexdigest()


def _describe(store: ObjectStore, uri: str) -> _Model:
    labels = json.loads(store.read(join_uri(uri, "labels.json")))
    return _Model(uri, labels, json.loads(store.read(join_uri(uri, "preprocessing.json")))["image_size"])


def _score(dataset: dict[str, Any], models: Mapping[str, _Model], on_progress: OnProgress) -> dict[str, npt.NDArray[np.float32]]:
    """The probabilities of each model for every holdout image, by tasks of one image range and one image size."""
    by_size: dict[int, dict[str, str]] = defaultdict(dict)
    for digest, model in models.items():
        by_size[model.image_size][digest] = model.uri
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    total = dataset["holdout"]
    parts = max(1, min(-(-total // IMAGES_PER_TASK), int(resources.get("CPU", 1))))
    ranges = np.array_split(np.arange(total), parts)
    held = {"cpu": 1, "gpu": 1 if resources.get("GPU") else 0}
    pending = {
        submit(_score_range, dataset["uri"], uris, int(rows[0]), int(rows[-1]) + 1, name="evaluate", resources=held): int(rows[0])
        for rows in ranges if len(rows) for uris in by_size.values()
    }  # fmt: skip
    scores: dict[str, dict[int, npt.NDArray[np.float32]]] = defaultdict(dict)
    number = len(pending)
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        start = pending.pop(ready)
        for digest, probabilities_NC in _result(ready).items():
            scores[digest][start] = probabilities_NC
        on_progress(total * (number - len(pending)) / number, total)
    return {digest: np.concatenate([found[start] for start in sorted(found)]) for digest, found in scores.items()}


def _result(reference: Any) -> dict[str, npt.NDArray[np.float32]]:
    """A task's scores, or the error that it met, not wrapped: an altered model is no bug of ours."""
    try:
        scores: dict[str, npt.NDArray[np.float32]] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnfreezeError):
            raise error.cause from None
        raise
    return scores


def _score_range(dataset_uri: str, model_uris: dict[str, str], start: int, stop: int) -> dict[str, npt.NDArray[np.float32]]:
    """Runs on a worker."""
    import_timm()
    import torch

    from ray_jobs.evaluate import score_range
    from ray_jobs.images import Range

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one CPU is what this task reserved
    store, cache = object_store(), cache_dir()
    rows = Range(open_dataset(dataset_uri, store, cache / "datasets"), "holdout", start, stop)
    models = {digest: fetch(store, uri, cache / "models") for digest, uri in model_uris.items()}
    return score_range(rows, models)


def _summarise(
    store: ObjectStore, dataset: dict[str, Any], models: Mapping[str, _Model], scores: Mapping[str, npt.NDArray[np.float32]],
    digests: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, bytes]]:  # fmt: skip
    """The metrics by name, the challenger's most confident mistakes, and a file of predictions a name."""
    from ray_jobs import evaluate as scoring
    from ray_jobs.images import Range, labels_of

    classes = dataset["classes"]
    data = open_dataset(dataset["uri"], store, cache_dir() / "datasets")
    labels_N = labels_of(data, "holdout")
    holdout = Range(data, "holdout", 0, len(labels_N))
    metrics: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for digest, model in models.items():
        aligned_NK, outside_N = scoring.aligned(scores[digest], model.labels, classes)
        metrics[digest] = measure(aligned_NK, labels_N, classes, outside_N)
        rows[digest] = scoring.predictions(holdout, classes, aligned_NK, outside_N)
    shown = digests.get("challenger") or next(iter(digests.values()))
    result = {
        "evaluation": {name: metrics[digest] for name, digest in digests.items()},
        "mistakes": scoring.mistakes(rows[shown], MISTAKES),
        "holdout": {"version": dataset["version"], "images": len(labels_N)},
        "labels": {name: models[digest].labels for name, digest in digests.items()},
    }
    return result, {f"{name}.parquet": scoring.to_parquet(rows[digest], scores[digest]) for name, digest in digests.items()}
