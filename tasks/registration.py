"""The step that registers an accepted model in MLflow: one run for the fit, one version with signature, example and tags."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from infra import progress, registry, settings, tracking
from infra.committed_folder import fetch
from infra.object_store import join_uri, object_store
from infra.tracking import Metric, RunRecord
from ray_jobs import preprocessing
from ray_jobs.spec import Spec
from tasks.accounts import metrics_of
from tasks.lineage import git_commit
from tasks.policies import effect
from tasks.search import common_tags

SERVING_PACKAGES = ("mlflow", "torch", "timm", "pillow", "safetensors", "numpy", "pandas")


@effect(name="register", timeout_s=1800)
def register_model(
    spec: Spec,
    dataset: dict[str, Any],
    backbone: dict[str, Any],
    search: dict[str, Any],
    fit: dict[str, Any],
    evaluation: dict[str, Any],
    example: bytes,
) -> dict[str, Any]:
    """The registered version of the chosen model, made once for a fit; its version, run id and artifact URI."""
    identity = fit["fit_id"]
    with progress.step("Registering the model in MLflow"):
        found = registry.find(spec.name, identity)
        if found is None:
            found = _register(spec, dataset, backbone, search, fit, evaluation, example)
        artifact_uri = join_uri(spec.storage, "models", spec.name, found.version)
        if found.tags.get("unfreeze.artifact_uri") != artifact_uri:
            registry.set_tags(found, {"unfreeze.artifact_uri": artifact_uri})
    return {"name": spec.name, "version": found.version, "run_id": found.run_id, "artifact_uri": artifact_uri}


def _register(
    spec: Spec,
    dataset: dict[str, Any],
    backbone: dict[str, Any],
    search: dict[str, Any],
    fit: dict[str, Any],
    evaluation: dict[str, Any],
    example: bytes,
) -> registry.ModelVersion:
    experiment = tracking.experiment_id(spec.name)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        save_pyfunc(fetch(object_store(), fit["model_uri"], settings.cache_dir() / "models"), model, example)
        run_id = tracking.write_run(experiment, _fit_record(spec, dataset, search, fit, model))
    challenger = evaluation["evaluation"]["challenger"]
    scores = {key: challenger[key] for key in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "ece")}
    depth, lr = (fit["unfreeze_depth"], fit["lr"]) if fit["chosen"] == "fit" else (0, search["probe"]["lr"])
    tags = common_tags(spec, dataset) | {
        "unfreeze.identity": fit["fit_id"],
        "unfreeze.search_id": search["search_id"],
        "unfreeze.git_commit": git_commit() or "unknown",
        "unfreeze.backbone": backbone["name"],
        "unfreeze.backbone_digest": backbone["digest"],
        "unfreeze.kind": fit["chosen"],
        "unfreeze.unfreeze_depth": str(depth),
        "unfreeze.lr": f"{lr:.6g}",
        **{f"unfreeze.holdout_{key}": f"{value:.6f}" for key, value in scores.items() if _is_number(value)},
    }
    kind = f"unfreeze depth {depth}" if fit["chosen"] == "fit" else "linear probe"
    description = f"{backbone['name']}, {kind}: {fit['chosen_reason']}"
    return registry.register(spec.name, run_id=run_id, artifact="model", tags=tags, description=description)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _fit_record(spec: Spec, dataset: dict[str, Any], search: dict[str, Any], fit: dict[str, Any], model: Path) -> RunRecord:
    started_ms = at_ms = int(fit.get("started_at", 0)) or int(search["trials_detail"][0]["started_at"] + 1000 * search["seconds"])
    metrics = []
    for point in fit["curve"]:
        at_ms += int(1000 * point["seconds"])
        values = {key: point[key] for key in ("val_accuracy", "val_loss", "train_loss")}
        metrics += [Metric(key, float(value), point["epoch"], at_ms) for key, value in values.items() if _is_number(value)]
    return RunRecord(
        identity=fit["fit_id"],
        name=f"fit {fit['fit_id'][:8]}",
        tags=common_tags(spec, dataset)
        | {"unfreeze.kind": "fit", "unfreeze.search_id": search["search_id"], "unfreeze.chosen": fit["chosen"]},
        params={"unfreeze_depth": fit["unfreeze_depth"], "lr": fit["lr"], "workers": fit["workers"], "augmentation": fit["augmentation"]},
        metrics=[*metrics, Metric("seconds", float(fit["seconds"])), *metrics_of(fit)],
        started_ms=started_ms,
        ended_ms=max(at_ms, started_ms + int(1000 * fit["seconds"])),
        files={"model": model},
    )


def save_pyfunc(folder: Path, target: Path, example: bytes) -> None:
    """Save a model folder as an MLflow pyfunc at `target`: code, safetensors and JSON, no pickle. `example`: an encoded image."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    with tempfile.TemporaryDirectory() as scratch:
        artifact = Path(scratch) / "model"
        shutil.copytree(folder, artifact)
        shutil.copy(preprocessing.__file__, artifact / "preprocessing.py")
        inputs = Schema([ColSpec(DataType.binary, "image")])
        outputs = Schema(
            [
                ColSpec(DataType.string, "class", required=False),
                ColSpec(DataType.double, "probability", required=False),
                ColSpec(DataType.string, "error", required=False),
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns that an untyped DataFrame is not validated; the signature does that
            mlflow.pyfunc.save_model(
                path=str(target),
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={"model": str(artifact)},
                signature=ModelSignature(inputs, outputs),
                input_example=pd.DataFrame({"image": [example]}),
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in SERVING_PACKAGES],
            )
