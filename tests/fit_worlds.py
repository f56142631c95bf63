"""A small real fit to test with: prepared images of three colours, a tiny timm backbone with random weights, and a probe's head."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from infra.committed_folder import commit
from infra.object_store import ObjectStore, join_uri
from ray_jobs import backbone, prepare
from ray_jobs.fit_plan import Plan, plan_fit
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tests.strategies import write_folder

BACKBONE = "test_efficientnet"
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}

PLAIN = {"weight_decay": 1e-4, "label_smoothing": 0.0, "layer_decay": 1.0, "optimizer": "adamw"}


@dataclass
class FitWorld:
    """What the steps before the fit leave behind."""

    spec: Spec
    store: ObjectStore
    dataset: dict[str, Any]
    backbone: dict[str, Any]
    search: dict[str, Any]

    def plan(self, **changes: Any) -> Plan:
        fields = {**plan_fit(self.spec, self.dataset, self.backbone, self.search).__dict__, **changes}
        return Plan(**fields)


def image_files(each: int) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for label, colour in COLOURS.items():
        for number in range(each):
            pixels = np.clip(np.array(colour) + rng.normal(0, 70, (36, 40, 3)), 0, 255).astype(np.uint8)
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, "PNG")
            files[f"{label}/{number:03}.png"] = sink.getvalue()
    return files


def make_world(folder: Path, store: ObjectStore, *, each: int = 24, **fit: Any) -> FitWorld:
    """Prepare images, a backbone and a probe on `store`."""
    source = write_folder(folder / "source", image_files(each))
    spec = parse_spec({
        "name": "colours", "data": {"source": str(source), "image_size": 32, "val_fraction": 0.25, "holdout_fraction": 0.2},
        "backbone": {"name": BACKBONE, "weights": "none"}, "search": {"unfreeze_depth": [0, 1], "max_epochs": 3},
        "fit": {"batch_size_per_worker": 8, "augmentation": "photo", "patience": 3, **fit},
    })  # fmt: skip
    dataset = prepare.prepare(spec, on_progress=lambda done, total: None, make_store=lambda: store)
    config = backbone.build(spec.backbone, image_size=32, seed=0, folder=folder / "backbone", store=store)
    uri = join_uri(spec.storage, "backbones", config["digest"])
    commit(store, uri, {path.name: path for path in (folder / "backbone").iterdir()})
    model = backbone.load(folder / "backbone", num_classes=3, seed=0)
    head = backbone.head_names(model)
    probe_uri = join_uri(spec.storage, "searches", "s", "probe.safetensors")
    with torch.no_grad():
        store.write(probe_uri, save({name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in head}))
    search = {
        "search_id": "s", "best": {"unfreeze_depth": 1, "lr": 3e-3, "accuracy": 0.5, **PLAIN},
        "probe": {"lr": 1e-3, "accuracy": 0.2, "val_loss": 1.1, "uri": probe_uri},
    }  # fmt: skip
    return FitWorld(spec, store, dataset, {**config, "uri": uri}, search)
