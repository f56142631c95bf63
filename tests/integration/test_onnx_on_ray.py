"""The ONNX export runs in a worker, once for a model, and whatever becomes of the worker the model is published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from infra.committed_folder import read_manifest
from infra.errors import UserError
from infra.object_store import object_store
from tests.integration.test_search_on_ray import BUCKET, machine, prepared  # noqa: F401 - fixtures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours
STORAGE = f"s3://{BUCKET}"


def _die(_: object) -> None:
    os._exit(1)


def _model(dataset: dict[str, Any], seed: int) -> str:
    """A random model's folder; its URI."""
    from ray_jobs import backbone
    from ray_jobs.model_folder import Preprocessing, write

    name, classes, uri = "test_efficientnet", dataset["classes"], f"{STORAGE}/fits/{seed}/fit"
    model = backbone.create(name, image_size=32, num_classes=len(classes), seed=seed)
    config = {"backbone": name, "num_classes": len(classes), "image_size": 32}
    view = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 10**8)
    write(object_store(), uri, model, config=config, labels=classes, preprocessing=view)
    return uri


def test_an_export_started_early_is_waited_for_and_later_ones_find_it(
    machine: Path, prepared: tuple[dict[str, Any], dict[str, Any]]  # noqa: F811
) -> None:  # fmt: skip
    from ray_jobs import onnx_on_ray

    dataset, _ = prepared
    model_uri = _model(dataset, 1)
    uri = onnx_on_ray.start_export(model_uri, dataset["uri"], STORAGE)
    under_way = onnx_on_ray._under_way[uri]
    assert onnx_on_ray.start_export(model_uri, dataset["uri"], STORAGE) == uri
    assert onnx_on_ray._under_way == {uri: under_way}
    found = onnx_on_ray.export(model_uri, dataset["uri"], STORAGE)
    assert found["uri"] == uri
    assert found["exported"] is True
    assert found["max_difference"] <= 1e-4
    manifest = read_manifest(object_store(), uri)
    assert manifest is not None
    assert "model.onnx" in [entry.key for entry in manifest.objects]
    assert onnx_on_ray.export(model_uri, "s3://nobody/asks", STORAGE) == found
    assert onnx_on_ray._under_way == {}


def test_a_worker_that_dies_of_the_export_costs_the_file_alone(
    machine: Path, prepared: tuple[dict[str, Any], dict[str, Any]]  # noqa: F811
) -> None:  # fmt: skip
    from ray_jobs import onnx_on_ray
    from ray_jobs.workers import submit

    dataset, _ = prepared
    model_uri = _model(dataset, 2)
    uri = onnx_on_ray.target_uri(object_store(), model_uri, STORAGE)
    onnx_on_ray._under_way[uri] = submit(_die, None, name="onnx")
    found = onnx_on_ray.export(model_uri, dataset["uri"], STORAGE)
    assert found["exported"] is False
    assert found["uri"] is None
    assert "WorkerCrashedError" in found["why"]
    assert onnx_on_ray.export(model_uri, dataset["uri"], STORAGE)["exported"] is True


def test_a_model_that_is_not_there_is_said(machine: Path) -> None:  # noqa: F811
    from ray_jobs import onnx_on_ray

    with pytest.raises(UserError, match="no committed model"):
        onnx_on_ray.export(f"{STORAGE}/fits/none/fit", "s3://x/y", STORAGE)
