"""Score models on a range of holdout images, and turn the scores of all ranges into metrics and mistakes.

Each model sees the images through its own preprocessing; images are decoded once a range and preprocessing.
Shapes: N images of the range, B images of a batch, C classes that a model knows, K classes of the data.

A model that was trained on other labels is compared by label name: a class of the data that it does not know counts as
wrong whatever it answers, and so does an answer that is no class of the data.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from ray_jobs import images
from ray_jobs.images import Range
from ray_jobs.metrics import NO_CLASS, aligned, choose
from ray_jobs.model_folder import Preprocessing, load_model, read_preprocessing
from ray_jobs.preprocessing import normalise

__all__ = ["Preprocessing", "aligned", "load_model", "mistakes", "predictions", "probabilities", "score_range", "to_parquet"]

EVAL_BATCH = 64

Floats = npt.NDArray[np.floating[Any]]


def score_range(rows: Range, models: Mapping[str, Path]) -> dict[str, npt.NDArray[np.float32]]:
    """The probabilities (N x C) that each model gives to the rows; `models` are local model folders by name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
    scores = {}
    for name, folder in models.items():
        view = read_preprocessing(folder)
        key = (view.image_size, view.max_pixels)
        if key not in pixels:
            pixels[key] = images.squares(rows, image_size=view.image_size, max_pixels=view.max_pixels).numpy()
        model, _, _ = load_model(folder)
        scores[name] = probabilities(model.to(device), pixels[key], view)
    return scores


@torch.inference_mode()
def probabilities(model: nn.Module, pixels_NHWC: npt.NDArray[np.uint8], view: Preprocessing) -> npt.NDArray[np.float32]:
    """The model's probabilities (N x C) for uint8 squares."""
    device = next(model.parameters()).device
    parts = [np.zeros((0, 0), np.float32)]
    for start in range(0, len(pixels_NHWC), EVAL_BATCH):
        batch_BCHW = torch.from_numpy(normalise(pixels_NHWC[start : start + EVAL_BATCH], view.mean, view.std))
        logits_BC = model(batch_BCHW.to(device))
        parts.append(logits_BC.float().softmax(1).cpu().numpy())
    return np.concatenate(parts[1:]) if len(parts) > 1 else parts[0]


def predictions(rows: Range, classes: Sequence[str], probabilities_NK: Floats, outside_N: Floats | None = None) -> list[dict[str, Any]]:
    """One row an image: its digest and file, its true class, and what was predicted with which probability."""
    predicted_N, confidence_N = choose(probabilities_NK, outside_N)
    names = [classes[number] if number != NO_CLASS else None for number in predicted_N]
    values = zip(rows.column("sha256"), rows.column("name"), rows.column("label"), names, confidence_N.tolist(), strict=True)
    return [dict(zip(("sha256", "file", "true", "predicted", "probability"), row, strict=True)) for row in values]


def mistakes(rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The wrong answers of highest probability."""
    wrong = [dict(row) for row in rows if row["true"] != row["predicted"]]
    return sorted(wrong, key=lambda row: (-row["probability"], row["sha256"]))[:most]


def to_parquet(rows: Sequence[Mapping[str, Any]], probabilities_NC: Floats) -> bytes:
    """Predictions as the bytes of a Parquet file, with all probabilities of each image in the order of the model's own labels."""
    schema = pa.schema([
        ("sha256", pa.string()), ("file", pa.string()), ("true", pa.string()), ("predicted", pa.string()), ("probability", pa.float64()),
    ])  # fmt: skip
    table = pa.Table.from_pylist([dict(row) for row in rows], schema)
    values = pa.array(np.ascontiguousarray(probabilities_NC, np.float32).ravel())
    lists = pa.ListArray.from_arrays(pa.array(np.arange(len(rows) + 1, dtype=np.int32) * probabilities_NC.shape[1]), values)
    buffer = io.BytesIO()
    pq.write_table(table.append_column("probabilities", lists), buffer)
    return buffer.getvalue()
