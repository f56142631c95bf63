"""What the gate judges: two models' probabilities on the same holdout images, in an order that does not matter (pure).

Shapes: N images, K classes of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_jobs.metrics import NO_CLASS, SMALLEST_PROBABILITY, choose

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's probabilities for the data's classes, and its highest one outside them: what `ray_jobs.evaluate.aligned` gives."""

    probabilities_NK: Floats
    outside_N: Floats | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """The holdout images that are left to judge on, and what each model answers.

    `champion` is None for the first version, `probe` where the challenger has no linear probe of its own. `removed` of
    `images_before` images were taken out because a model may have seen them in training. `slices` has the value of each
    image by manifest column. `is_champion`: the challenger is the very model that serves.
    """

    classes: Sequence[str]
    true_N: Ints
    challenger: Scores
    champion: Scores | None = None
    probe: Scores | None = None
    slices: Mapping[str, Sequence[Any]] | None = None
    removed: int = 0
    images_before: int | None = None
    is_champion: bool = False

    def __post_init__(self) -> None:
        n, k = len(self.true_N), len(self.classes)
        assert len(set(self.classes)) == k, "a class is named twice"
        assert n == 0 or (self.true_N.min() >= 0 and self.true_N.max() < k), "a true class has no name"
        for scores in (self.challenger, self.champion, self.probe):
            assert scores is None or scores.probabilities_NK.shape == (n, k), "not a probability for each image and class"
            assert scores is None or scores.outside_N is None or scores.outside_N.shape == (n,)
        assert all(len(values) == n for values in (self.slices or {}).values()), "a slice has not a value for each image"
        assert self.images_before is None or self.images_before == n + self.removed


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model says of each image: its class (NO_CLASS: none of the data's), how sure, and its probability of the true class."""

    class_N: Ints
    right_N: npt.NDArray[np.bool_]
    confidence_N: Floats
    loss_N: Floats
    finite_N: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Facts:
    """The evidence with classes by name and images by content, so that the order in which it came changes no figure."""

    classes: list[str]
    true_N: Ints
    challenger: Answers
    champion: Answers | None
    probe: Answers | None
    slices: dict[str, npt.NDArray[np.str_]]
    removed: int

    @property
    def images(self) -> int:
        return len(self.true_N)


def facts(evidence: Evidence) -> Facts:
    """The evidence in its own order."""
    by_name = np.argsort(np.asarray(evidence.classes, object), kind="stable")
    true_N = np.argsort(by_name)[evidence.true_N] if len(by_name) else evidence.true_N
    models = [
        None if given is None else _answers(given, by_name, true_N) for given in (evidence.challenger, evidence.champion, evidence.probe)
    ]
    keys = [true_N, *(key for model in models if model for key in (model.class_N, model.confidence_N, model.loss_N))]
    order_N = np.lexsort(keys[::-1])
    challenger, champion, probe = (None if model is None else _in_order(model, order_N) for model in models)
    assert challenger is not None
    slices = {column: np.asarray([str(value) for value in values])[order_N] for column, values in (evidence.slices or {}).items()}
    names = [evidence.classes[k] for k in by_name]
    return Facts(names, true_N[order_N], challenger, champion, probe, slices, evidence.removed)


def _answers(scores: Scores, by_name: Ints, true_N: Ints) -> Answers:
    """A row that is not finite is certain of no class of the data, so it is wrong at the highest loss there is."""
    probabilities_NK = np.asarray(scores.probabilities_NK, np.float64)[:, by_name]
    finite_N = np.isfinite(probabilities_NK.sum(1))
    if scores.outside_N is not None:
        finite_N &= np.isfinite(scores.outside_N)
    if not probabilities_NK.size:
        nothing = np.zeros(0)
        return Answers(true_N, nothing.astype(bool), nothing, nothing, finite_N)
    class_N, confidence_N = choose(np.where(finite_N[:, None], probabilities_NK, 0.0), scores.outside_N)
    class_N = np.where(finite_N, class_N, NO_CLASS)
    confidence_N = np.where(finite_N, confidence_N, 1.0)
    of_true_N = np.where(finite_N, probabilities_NK[np.arange(len(true_N)), true_N], 0.0)
    loss_N = -np.log(np.clip(of_true_N, SMALLEST_PROBABILITY, 1.0))
    return Answers(class_N, class_N == true_N, confidence_N, loss_N, finite_N)


def _in_order(answers: Answers, order_N: Ints) -> Answers:
    return Answers(*(getattr(answers, name)[order_N] for name in ("class_N", "right_N", "confidence_N", "loss_N", "finite_N")))
