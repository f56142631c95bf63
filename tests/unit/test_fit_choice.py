"""Which model of a fit is kept."""

from __future__ import annotations

from typing import Any

import pytest

from ray_jobs.fit_choice import best_of, falls_short

SEARCH = {"best": {"accuracy": 0.9}, "probe": {"accuracy": 0.7}}
VAL_IMAGES = 400


def fit(accuracy: float | None, augmentation: str = "photo", chosen: str = "fit") -> dict[str, Any]:
    loss = None if accuracy is None else 1.0 - accuracy
    return {
        "accuracy": accuracy, "val_loss": loss, "chosen": chosen, "chosen_reason": f"By {augmentation}.", "augmentation": augmentation,
        "seconds": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "images", "short"),
    [
        (fit(0.95), 400, False),
        (fit(0.9), 400, False),
        (fit(0.88), 400, False),  # a standard error of the difference is 2.2 points here
        (fit(0.84), 400, True),
        (fit(0.84), 100, False),
        (fit(0.88), 40_000, True),
        (fit(0.69, chosen="probe"), 10, True),  # not negative transfer: the trial beat the probe
        (fit(None, chosen="probe"), 400, True),
    ],
)
def test_a_fit_falls_short_where_it_is_clearly_worse_than_its_trial(given: dict[str, Any], images: int, short: bool) -> None:
    assert falls_short(given, SEARCH, images) == short


def test_a_trial_that_did_not_beat_the_probe_asks_nothing_of_the_fit() -> None:
    assert not falls_short(fit(0.6, chosen="probe"), {**SEARCH, "probe": {"accuracy": 0.9}}, VAL_IMAGES)


def test_trials_and_fits_that_are_never_wrong_can_be_compared() -> None:
    search = {"best": {"accuracy": 1.0}, "probe": {"accuracy": 0.5}}
    assert not falls_short(fit(1.0), search, 50)
    assert falls_short(fit(0.9), search, 50)


def test_one_fit_that_is_good_enough_keeps_its_reason() -> None:
    found = best_of([fit(0.9)], SEARCH, VAL_IMAGES)
    assert found == {**fit(0.9), "falls_short": False, "fits": 1}


def test_the_better_of_two_fits_is_kept_and_both_are_told() -> None:
    found = best_of([fit(0.5), fit(0.89, "none")], SEARCH, VAL_IMAGES)
    assert (found["augmentation"], found["falls_short"], found["fits"], found["seconds"]) == ("none", False, 2, 4.0)
    assert "(0.900): 0.500 with augmentation photo, 0.890 with augmentation none." in found["chosen_reason"]


def test_without_augmentation_is_not_kept_where_it_is_no_better() -> None:
    found = best_of([fit(0.8), fit(0.75, "none")], SEARCH, VAL_IMAGES)
    assert (found["augmentation"], found["falls_short"]) == ("photo", True)
    assert "max_epochs" in found["chosen_reason"]


def test_a_fit_is_kept_before_one_whose_probe_was_better() -> None:
    assert best_of([fit(0.69, chosen="probe"), fit(0.72, "none")], SEARCH, VAL_IMAGES)["chosen"] == "fit"


def test_a_probe_that_the_trial_had_beaten_is_not_called_negative_transfer() -> None:
    found = best_of([fit(0.6, chosen="probe"), fit(None, "none", chosen="probe")], SEARCH, VAL_IMAGES)
    assert (found["augmentation"], found["chosen"], found["falls_short"]) == ("photo", "probe", True)
    assert found["chosen_reason"].startswith("The linear probe is kept (0.700 on val): the fit came to 0.600.")
    assert "no number with augmentation none" in found["chosen_reason"]
