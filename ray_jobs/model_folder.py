"""A trained model as a folder of plain files: weights, what they are, the labels, and how an image becomes their input.

model.safetensors (timm's names, with the classifier), config.json, labels.json, preprocessing.json. The challenger, the probe
and the champion all have this form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from infra.committed_folder import commit
from infra.object_store import ObjectStore
from ray_jobs import backbone


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes the model's input (see preprocessing.py)."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int
    interpolation: str = "bicubic"


def write(
    store: ObjectStore, uri: str, model: nn.Module, *, config: dict[str, Any], labels: Sequence[str], preprocessing: Preprocessing
) -> None:
    """Commit the model at `uri`; a folder that already holds the same costs no transfer."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    commit(store, uri, {
        "model.safetensors": to_safetensors(tensors),
        "config.json": json.dumps(config, indent=1).encode(),
        "labels.json": json.dumps(list(labels), ensure_ascii=False).encode(),
        "preprocessing.json": json.dumps(asdict(preprocessing), indent=1).encode(),
    })  # fmt: skip


def load_model(folder: Path) -> tuple[nn.Module, Preprocessing, list[str]]:
    """The model in eval mode, its preprocessing and its labels, from a local copy of a model folder."""
    config = json.loads((folder / "config.json").read_bytes())
    labels: list[str] = json.loads((folder / "labels.json").read_bytes())
    model = backbone.create(config["backbone"], image_size=config["image_size"], num_classes=len(labels), seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval(), read_preprocessing(folder), labels


def read_preprocessing(folder: Path) -> Preprocessing:
    values = json.loads((folder / "preprocessing.json").read_bytes())
    return Preprocessing(values["image_size"], tuple(values["mean"]), tuple(values["std"]), values["max_pixels"], values["interpolation"])
