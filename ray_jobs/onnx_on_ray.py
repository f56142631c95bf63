"""The ONNX export on Ray: in a worker that has torch loaded, beside whatever the driver does meanwhile."""

from __future__ import annotations

import importlib.metadata
import json
import time
from typing import Any

import ray

from infra.committed_folder import read_manifest
from infra.errors import UserError
from infra.object_store import ObjectStore, join_uri, object_store
from infra.settings import cache_dir
from ray_jobs.features_on_ray import result_of
from ray_jobs.light_timm import import_timm
from ray_jobs.spec import digest_of
from ray_jobs.workers import submit

EXPORT_CODE_VERSION = 1
"""Raise it when the same model would be exported or verified otherwise."""
PACKAGES = ("torch", "onnx", "onnxruntime")
LONGEST_S = 900.0
"""A champion does not wait longer than that for its ONNX file."""

_under_way: dict[str, Any] = {}
"""The exports of this process by their target: one that was started early is waited for, not started again."""


def start_export(model_uri: str, dataset_uri: str, storage: str) -> str:
    """Begin the export unless it is there already or under way; where it will be committed."""
    store = object_store()
    uri = target_uri(store, model_uri, storage)
    if uri not in _under_way and read_manifest(store, uri) is None:
        resources = {"cpu": 1}  # none of the GPUs: the file is made and verified on the CPU
        _under_way[uri] = submit(_export, model_uri, dataset_uri, uri, name="onnx", resources=resources)
    return uri


def export(model_uri: str, dataset_uri: str, storage: str) -> dict[str, Any]:
    """The verified file's folder and figures: {"uri", "exported", "max_difference", "max_logit_difference", "images", "why"}.

    A model that cannot be exported, or a worker that dies of it, is an answer and no error: "exported" is False, "uri" None.
    """
    from ray_jobs.onnx_export import VERIFIED, refused

    started = time.monotonic()
    uri = start_export(model_uri, dataset_uri, storage)
    reference = _under_way.pop(uri, None)
    if reference is None:
        found: dict[str, Any] = json.loads(object_store().read(join_uri(uri, VERIFIED)))
    else:
        found = _awaited(reference) or refused(f"it took longer than {time.monotonic() - started:.0f} s")
    return {"uri": uri if found["exported"] else None, **found}


def target_uri(store: ObjectStore, model_uri: str, storage: str) -> str:
    """Named by the model's content and by what exports it."""
    manifest = read_manifest(store, model_uri)
    if manifest is None:
        raise UserError(f"There is no committed model at {model_uri}.", "Check the address; `unfreeze verify` says what is there.")
    parts = ("model.safetensors", "config.json", "labels.json", "preprocessing.json")
    model = [[entry.key, entry.sha256] for entry in manifest.objects if entry.key in parts]
    versions = [importlib.metadata.version(package) for package in PACKAGES]
    return join_uri(storage, "onnx", digest_of({"model": model, "code": EXPORT_CODE_VERSION, "versions": versions}))


def _awaited(reference: Any) -> dict[str, Any] | None:
    """What the worker answered; None where it did not in time."""
    from ray_jobs.onnx_export import refused

    ready, _ = ray.wait([reference], timeout=LONGEST_S)
    if not ready:
        ray.cancel(reference)
        return None
    try:
        found: dict[str, Any] = result_of(reference)
    except ray.exceptions.RayError as error:  # killed for its memory, or a crash inside the exporter, in spite of the retries
        return refused(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    return found


def _export(model_uri: str, dataset_uri: str, uri: str) -> dict[str, Any]:
    """Runs on a worker."""
    import_timm()
    import torch

    from ray_jobs.onnx_export import Export, run

    torch.set_num_threads(1)  # one CPU is what this task reserved
    return run(Export(model_uri, dataset_uri, uri), object_store(), cache_dir())
