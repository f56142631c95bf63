"""How good a classifier's probabilities are on labelled images: plain numbers, ready for JSON.

Shapes: N images, K classes of the data. Everything is defined for every input: see `measure`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from infra.errors import UserError

ECE_BINS = 15
SMALLEST_PROBABILITY = 1e-15  # keeps the log loss of a certain and wrong answer finite (34.5), so that it fits in JSON
NO_CLASS = -1

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def measure(probabilities_NK: Floats, labels_N: Ints, classes: Sequence[str], outside_N: Floats | None = None) -> dict[str, Any]:
    """Every metric of a classifier on the images whose true classes are `labels_N`.

    A class without an image has no precision, recall and F1 (null), and the macro averages leave it out. A row that is not
    finite counts as certain of a wrong class, so a model that yields NaN can never win. `outside_N` is the highest
    probability that the model gives to a class that the data does not have; where it is the highest of all, the answer is
    wrong and in no column of the confusion matrix.
    """
    if not len(labels_N):
        raise UserError("There is no image to judge the models on.", "Raise data.holdout_fraction, or give more images.")
    probabilities_NK = _worst_where_not_finite(np.asarray(probabilities_NK, np.float64), labels_N)
    predicted_N, confidence_N = choose(probabilities_NK, outside_N)
    correct_N = predicted_N == labels_N
    support_K = np.bincount(labels_N, minlength=len(classes))
    present = [k for k in range(len(classes)) if support_K[k]]
    scores = _per_class(labels_N, predicted_N, present)
    reliability, ece = _calibration(confidence_N, correct_N)
    true_N = probabilities_NK[np.arange(len(labels_N)), labels_N]
    return {
        "accuracy": float(correct_N.mean()),
        "balanced_accuracy": float(np.mean([scores[k]["recall"] for k in present])),
        **{f"macro_{name}": float(np.mean([scores[k][name] for k in present])) for name in ("precision", "recall", "f1")},
        "log_loss": float(-np.log(np.clip(true_N, SMALLEST_PROBABILITY, 1.0)).mean()),
        "ece": ece,
        "images": len(labels_N),
        "per_class": {
            label: {**scores.get(k, {"precision": None, "recall": None, "f1": None}), "support": int(support_K[k])}
            for k, label in enumerate(classes)
        },
        "confusion": _confusion(labels_N, predicted_N, len(classes)),
        "reliability": reliability,
    }  # fmt: skip


def aligned(probabilities_NC: Floats, labels: Sequence[str], classes: Sequence[str]) -> tuple[Floats, Floats | None]:
    """The same probabilities by the data's classes (0 for one that the model does not know), and the highest outside them, if any."""
    if list(labels) == list(classes):
        return probabilities_NC, None
    column = {label: number for number, label in enumerate(labels)}
    aligned_NK = np.zeros((len(probabilities_NC), len(classes)), probabilities_NC.dtype)
    for number, label in enumerate(classes):
        if label in column:
            aligned_NK[:, number] = probabilities_NC[:, column[label]]
    outside = [number for label, number in column.items() if label not in set(classes)]
    return aligned_NK, probabilities_NC[:, outside].max(1) if outside else None


def choose(probabilities_NK: Floats, outside_N: Floats | None = None) -> tuple[Ints, Floats]:
    """The predicted class (NO_CLASS where it is none of the data's) and its probability; the first among equals."""
    predicted_N = probabilities_NK.argmax(1).astype(np.int64)
    confidence_N = probabilities_NK.max(1)
    if outside_N is not None:
        outside_wins_N = outside_N > confidence_N
        predicted_N = np.where(outside_wins_N, NO_CLASS, predicted_N)
        confidence_N = np.where(outside_wins_N, outside_N, confidence_N)
    return predicted_N, confidence_N


def _worst_where_not_finite(probabilities_NK: Floats, labels_N: Ints) -> Floats:
    bad_N: npt.NDArray[np.bool_] = ~np.isfinite(np.sum(probabilities_NK, axis=1))
    if not bad_N.any():
        return probabilities_NK
    worst_NK = np.where(bad_N[:, None], 0.0, probabilities_NK)
    worst_NK[bad_N, (labels_N[bad_N] + 1) % probabilities_NK.shape[1]] = 1.0
    return worst_NK


def _per_class(labels_N: Ints, predicted_N: Ints, present: Sequence[int]) -> dict[int, dict[str, float]]:
    """Precision (0 where never predicted), recall and F1 of each class that has images."""
    precision, recall, f1, _ = precision_recall_fscore_support(labels_N, predicted_N, labels=list(present), zero_division=0.0)
    return {k: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i])} for i, k in enumerate(present)}


def _confusion(labels_N: Ints, predicted_N: Ints, classes: int) -> list[list[int]]:
    """Rows are the true classes, columns the predicted ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn warns of a single class in both arrays, which is fine here
        counts: list[list[int]] = confusion_matrix(labels_N, predicted_N, labels=list(range(classes))).tolist()
    return counts


def _calibration(confidence_N: Floats, correct_N: npt.NDArray[np.bool_]) -> tuple[list[dict[str, float | int]], float]:
    """Reliability bins that hold an image, and the expected calibration error over 15 equal bins of confidence.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv:1706.04599).
    """
    bin_N = np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    bins: list[dict[str, float | int]] = []
    ece = 0.0
    for number in np.unique(bin_N):
        inside_N = bin_N == number
        confidence, accuracy = float(confidence_N[inside_N].mean()), float(correct_N[inside_N].mean())
        bins.append({"confidence": confidence, "accuracy": accuracy, "count": int(inside_N.sum())})
        ece += float(inside_N.mean()) * abs(accuracy - confidence)
    return bins, ece
