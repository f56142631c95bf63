"""Export one model folder to ONNX, verified on images of the data, as a committed folder onnx/DIGEST/ (model.onnx, verified.json).

DIGEST names the model and the exporter, so the same model is exported once. Nothing unverified is ever committed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.committed_folder import commit, fetch
from infra.object_store import ObjectStore
from ray_jobs.dataset import open_dataset
from ray_jobs.preprocessing import decode, normalise, to_square

if TYPE_CHECKING:
    from ray_jobs.model_folder import Preprocessing
    from ray_jobs.onnx_model import Images

FILE, VERIFIED = "model.onnx", "verified.json"
VERIFIED_ON = 16
LEAST = 8
"""Where the holdout has fewer images, those of the other splits are taken too."""


@dataclass(frozen=True)
class Export:
    """What to export and where to: plain values, so that it crosses processes."""

    model_uri: str
    dataset_uri: str
    target_uri: str


def run(work: Export, store: ObjectStore, cache: Path) -> dict[str, Any]:
    """Export and verify; {"exported", "max_difference", "max_logit_difference", "images", "why"}. What cannot be exported is no error."""
    from ray_jobs import onnx_model  # torch is loaded only now: a driver reads this module without it
    from ray_jobs.model_folder import load_model

    model, preprocessing, labels = load_model(fetch(store, work.model_uri, cache / "models"))
    try:
        file = onnx_model.export(model, preprocessing, labels)
        found = onnx_model.compare(model, file, sample(work.dataset_uri, preprocessing, store, cache))
    except onnx_model.NotExportableError as error:
        return refused(str(error))
    except Exception as error:  # a file that onnxruntime will not take: the model is good without it
        return refused(f"onnxruntime refused the file: {(str(error).splitlines() or [type(error).__name__])[0][:300]}")
    figures = {"max_difference": found.probabilities, "max_logit_difference": found.logits, "images": found.images}
    if not found.is_close:
        return refused(f"its answers differ by {found.probabilities:.2g} (logits by {found.logits:.2g}) from the model's") | {
            key: value if np.isfinite(value) else None for key, value in figures.items()
        }
    result = {"exported": True, **figures, "why": None}
    commit(store, work.target_uri, {FILE: file, VERIFIED: json.dumps(result, indent=1).encode()})
    return result


def refused(why: str) -> dict[str, Any]:
    """The answer where there is no file, and why."""
    return {"exported": False, "max_difference": None, "max_logit_difference": None, "images": 0, "why": why}


def sample(dataset_uri: str, preprocessing: Preprocessing, store: ObjectStore, cache: Path) -> Images:
    """A few images of the holdout, from all over it, as the model sees them."""
    dataset = open_dataset(dataset_uri, store, cache / "datasets")
    rows = dataset.rows(["holdout"])
    if len(rows) < LEAST:
        rows = dataset.all_rows
    chosen = sorted({rows[int(place)].index for place in np.linspace(0, len(rows) - 1, VERIFIED_ON)})
    size, most = preprocessing.image_size, preprocessing.max_pixels
    squares = [to_square(decode(data, most), size) for data in dataset.image_bytes_at(chosen)]
    images_NCHW: Images = normalise(np.stack(squares), preprocessing.mean, preprocessing.std)
    return images_NCHW
