"""The ONNX export runs in a worker, once for a model, and whatever becomes of the worker the model is published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from infra.committed_folder import read_manifest
from infra.errors import UserError
from infra.object_store import object_store
from tests.integration.test_search_on_ray import BUCKET, machine, prepared, spec_of  # noqa: F401 - fixtures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours
STORAGE = f"s3://{BUCKET}"


def _die(_: object) -> None:
    os._exit(1)


def _model(dataset: dict[str, Any], seed: int, name: str = "test_efficientnet", side: int = 32) -> str:
    """A random model's folder; its URI."""
    from ray_jobs import backbone
    from ray_jobs.model_folder import Preprocessing, write

    classes, uri = dataset["classes"], f"{STORAGE}/fits/{name}-{seed}/fit"
    model = backbone.create(name, image_size=side, num_classes=len(classes), seed=seed)
    config = {"backbone": name, "num_classes": len(classes), "image_size": side}
    view = Preprocessing(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 10**8)
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


@pytest.mark.parametrize(("name", "side", "exported"), [("test_efficientnet", 32, True), ("halonet26t", 256, False)])
def test_a_model_that_onnx_cannot_hold_is_published_without_the_file_and_why_is_said(
    machine: Path, prepared: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],  # noqa: F811
    name: str, side: int, exported: bool,
) -> None:  # fmt: skip
    import ray

    from tasks.publishing import publish, start_onnx_export

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")  # by another address it would be asked for its job server
    dataset, _ = prepared
    spec, uri, fit = spec_of(machine), f"{STORAGE}/models/{name}/1", {"model_uri": _model(dataset, 3, name, side)}
    evaluation = {"evaluation": {}, "holdout": {"version": dataset["version"]}}
    start_onnx_export.fn(spec, dataset, fit)  # type: ignore[attr-defined]
    published = publish.fn(spec, {"artifact_uri": uri}, fit, evaluation, {}, "<html>", serves=False)  # type: ignore[attr-defined]
    assert published["onnx"]["exported"] is exported
    assert published["verified"] is True
    manifest = read_manifest(object_store(), uri)
    assert manifest is not None
    keys = {entry.key for entry in manifest.objects}
    assert ("model.onnx" in keys) is exported
    assert keys >= {"model.safetensors", "config.json", "labels.json", "preprocessing.json", "evaluation.json", "report.html"}
    assert ("No ONNX file:" in capsys.readouterr().err) is not exported
    if exported:
        again = publish.fn(spec, {"artifact_uri": uri}, fit, evaluation, {}, "<html>", serves=False)  # type: ignore[attr-defined]
        assert again["transferred"] == 0
    else:
        assert "Unfold" in published["onnx"]["why"]
