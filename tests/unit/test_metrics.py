"""Classification metrics against worked examples, and their answers for the odd inputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from infra.errors import UserError
from ray_jobs.metrics import measure

CLASSES = ["a", "b", "c"]


def test_the_numbers_are_those_of_a_worked_example() -> None:
    probabilities_NK = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    found = measure(probabilities_NK, np.array([0, 1, 1, 2]), CLASSES)
    assert found["accuracy"] == 0.75
    assert found["images"] == 4
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["per_class"]["a"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found["log_loss"] == pytest.approx(log_loss([0, 1, 1, 2], probabilities_NK))


def test_the_calibration_error_of_a_certain_and_half_right_model_is_one_half() -> None:
    found = measure(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]), ["a", "b"])
    assert found["ece"] == pytest.approx(0.5)
    assert found["reliability"] == [{"confidence": 1.0, "accuracy": 0.5, "count": 2}]


def test_a_class_without_images_has_no_scores_and_stays_out_of_the_averages() -> None:
    found = measure(np.eye(3)[[0, 1]], np.array([0, 1]), CLASSES)
    assert found["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert found["macro_precision"] == found["balanced_accuracy"] == 1.0


def test_a_class_that_is_never_predicted_has_precision_zero() -> None:
    found = measure(np.array([[0.9, 0.1, 0.0]] * 2), np.array([0, 1]), CLASSES)
    assert found["per_class"]["b"]["precision"] == 0.0


def test_a_model_that_yields_nan_is_certain_and_wrong() -> None:
    found = measure(np.full((3, 3), math.nan), np.array([0, 1, 2]), CLASSES)
    assert found["accuracy"] == 0.0
    assert found["ece"] == 1.0
    assert found["log_loss"] == pytest.approx(-math.log(1e-15))


def test_an_answer_outside_the_data_is_wrong_and_in_no_column() -> None:
    probabilities_NK = np.array([[0.3, 0.1], [0.3, 0.1]])
    found = measure(probabilities_NK, np.array([0, 0]), ["a", "b"], outside_N=np.array([0.6, 0.2]))
    assert found["accuracy"] == 0.5
    assert found["confusion"] == [[1, 0], [0, 0]]


def test_no_images_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="holdout_fraction"):
        measure(np.zeros((0, 3)), np.zeros(0, np.int64), CLASSES)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(2, 5), st.randoms(use_true_random=False))
def test_every_metric_is_a_finite_fraction_that_json_can_hold(images: int, classes: int, random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    probabilities_NK = rng.dirichlet(np.ones(classes), images)
    labels_N = rng.integers(0, classes, images)
    found = measure(probabilities_NK, labels_N, [str(k) for k in range(classes)])
    json.dumps(found, allow_nan=False)
    assert 0 <= found["ece"] <= 1
    assert 0 <= found["macro_f1"] <= 1
    assert sum(map(sum, found["confusion"])) == images == sum(row["count"] for row in found["reliability"])
    assert found["accuracy"] == pytest.approx(np.trace(np.array(found["confusion"])) / images)
