"""An epoch that was trained ahead is given to the trial that it was trained for, once, and to no other."""

from __future__ import annotations

import dataclasses

import pytest

from ray_jobs import trial_epoch
from ray_jobs.search_space import TrialConfig
from ray_jobs.train_loop import EpochResult
from ray_jobs.work import Work

WORK = Work(
    backbone="resnet18", backbone_uri="s3://b/backbone", mean=(0.5,), std=(0.5,), image_size=32, num_classes=2, num_groups=4, features=(),
    sources=(), max_epochs=3, class_weights="none", seed=0,
)  # fmt: skip
POINT = TrialConfig(unfreeze_depth=1, lr=1e-3)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was really trained: (trial, epoch)."""
    calls: list[tuple[str, int]] = []

    def epoch(work: Work, point: TrialConfig, head: object, key: str, number: int) -> EpochResult:
        calls.append((key, number))
        return EpochResult(0.5, 0.5, len(calls) / 100, 0.1)

    monkeypatch.setattr(trial_epoch, "_epoch", epoch)
    monkeypatch.setattr(trial_epoch._Current, "ahead", None)
    return calls


def test_the_first_epoch_is_not_trained_twice(trained: list[tuple[str, int]]) -> None:
    trial_epoch.run_ahead(WORK, POINT, None, "4")
    first = trial_epoch.trial_epoch(WORK, POINT, None, "4", 1)
    second = trial_epoch.trial_epoch(WORK, POINT, None, "4", 2)
    assert trained == [("4", 1), ("4", 2)]
    assert (first["epoch"], first["val_accuracy"], second["epoch"]) == (1, 0.01, 2)


@pytest.mark.parametrize(
    ("work", "point", "key"),
    [(dataclasses.replace(WORK, seed=1), POINT, "4"), (WORK, dataclasses.replace(POINT, lr=2e-3), "4"), (WORK, POINT, "5")],
)
def test_what_was_trained_ahead_for_another_search_point_or_trial_does_not_count(
    work: Work, point: TrialConfig, key: str, trained: list[tuple[str, int]]
) -> None:
    trial_epoch.run_ahead(WORK, POINT, None, "4")
    trial_epoch.trial_epoch(work, point, None, key, 1)
    assert trained == [("4", 1), (key, 1)]


def test_a_trial_that_starts_again_is_trained_again(trained: list[tuple[str, int]]) -> None:
    trial_epoch.run_ahead(WORK, POINT, None, "4")
    for _ in range(2):
        trial_epoch.trial_epoch(WORK, POINT, None, "4", 1)
    assert trained == [("4", 1), ("4", 1)]
