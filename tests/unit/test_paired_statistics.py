"""The statistics under the gate against worked examples, against enumeration, and by their laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ray_jobs.metrics import measure
from tasks import paired_tests as tests
from tasks.paired_resampling import Metric, Pair, bootstrap, bounds

counts = st.integers(0, 30)


def test_a_published_example_comes_out_as_published() -> None:
    """Fagerland, Lydersen, Laake (2014): 7 against 1 of 21; exact p 0.070, mid-p 0.039 (two-sided), Tango's interval -0.517 to -0.026."""
    assert 2 * tests.mcnemar(7, 1) == pytest.approx(0.0703, abs=1e-4)
    assert 2 * tests.mcnemar_mid(7, 1) == pytest.approx(0.0391, abs=1e-4)
    assert tests.lowest_gain(1, 7, 21, 0.975) == pytest.approx(-0.517, abs=5e-4)
    assert tests.highest_gain(1, 7, 21, 0.975) == pytest.approx(-0.026, abs=5e-4)


@given(counts, counts)
def test_the_exact_chance_is_that_of_a_coin(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue if wins + losses else 1.0
    assert tests.mcnemar(wins, losses) == pytest.approx(expected)
    assert tests.mcnemar_mid(wins, losses) <= tests.mcnemar(wins, losses)
    assert tests.mcnemar_mid(wins, losses) + tests.mcnemar_mid(losses, wins) == pytest.approx(1.0)


def test_a_win_more_or_a_loss_less_never_looks_worse() -> None:
    n = 60
    wins, losses = np.meshgrid(np.arange(n // 2), np.arange(n // 2), indexing="ij")
    for rises in (tests.lowest_gain(wins, losses, n, 0.95), -tests.mcnemar(wins, losses), -tests.mcnemar_mid(wins, losses)):
        assert (np.diff(rises, axis=0) >= -1e-9).all()
        assert (np.diff(rises, axis=1) <= 1e-9).all()


@given(counts, counts, st.integers(0, 1000), st.floats(0.5, 0.999))
def test_the_bounds_enclose_the_gain_within_what_is_possible(wins: int, losses: int, others: int, confidence: float) -> None:
    images = wins + losses + others
    low, high = (float(bound(wins, losses, images, confidence)) for bound in (tests.lowest_gain, tests.highest_gain))
    assert -1 <= low <= (wins - losses) / max(images, 1) + 1e-9
    assert 1 >= high >= (wins - losses) / max(images, 1) - 1e-9


def test_no_disagreement_proves_the_less_the_fewer_the_images() -> None:
    assert tests.lowest_gain(0, 0, 20, 0.95) == pytest.approx(-0.119, abs=1e-3)
    assert tests.lowest_gain(0, 0, 2000, 0.95) == pytest.approx(-0.00135, abs=1e-4)


def test_the_lower_bound_is_too_high_in_about_one_case_of_twenty() -> None:
    rng = np.random.default_rng(0)
    wins, losses, _ = rng.multinomial(500, [0.08, 0.05, 0.87], 20_000).T
    assert (tests.lowest_gain(wins, losses, 500, 0.95) > 0.03).mean() == pytest.approx(0.05, abs=0.01)


def test_the_images_that_are_needed_give_the_power_that_was_wanted() -> None:
    needed = tests.images_needed(0.8, 0.1, 0.03, 0.0, 0.95)
    assert needed == 685
    assert tests.power(needed, 0.1, 0.03, 0.0, 0.95) == pytest.approx(0.8, abs=1e-3)
    assert tests.power(1000, 0.1, 0.03, 0.0, 0.95) == pytest.approx(0.91, abs=0.01)


def test_groups_too_small_to_fail_do_not_make_the_others_harder_to_fail() -> None:
    tested_K, error = tests.tested(np.array([100, 100, *[1] * 50]), 0.1)
    assert tested_K.tolist() == [True, True, *[False] * 50]
    assert error == pytest.approx(0.05)
    assert not tests.tested(np.array([1, 1]), 0.1)[0].any()


@st.composite
def pairs(draw: st.DrawFn, metric: Metric = "macro_f1") -> Pair:
    """Two models' answers on up to 40 images of up to five classes, some of which may be empty."""
    classes, images = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Pair(metric, rng.integers(0, classes, images), *(rng.integers(-1, classes, images) for _ in range(2)), classes)


@settings(max_examples=40)
@given(pairs(), st.sampled_from(["balanced_accuracy", "macro_f1"]))
def test_the_metrics_are_those_of_the_evaluation(pair: Pair, metric: Metric) -> None:
    names = [str(k) for k in range(pair.classes)]
    outside_N = np.where(pair.mine_N < 0, 2.0, 0.0)
    expected = measure(np.eye(pair.classes)[np.maximum(pair.mine_N, 0)], pair.true_N, names, outside_N)[metric]
    assert Pair(metric, pair.true_N, pair.mine_N, pair.theirs_N, pair.classes).scores()[0] == pytest.approx(expected)


@settings(max_examples=25)
@given(pairs())
def test_swaps_are_as_often_above_zero_as_below(pair: Pair) -> None:
    luck_B = pair.swapped(0)
    assert abs((luck_B > 1e-12).mean() - (luck_B < -1e-12).mean()) < 0.12
    assert np.abs(luck_B).max() <= 1


def test_with_one_class_swaps_say_what_the_exact_test_says() -> None:
    true_N, theirs_N = np.zeros(50, np.int64), np.array([0] * 40 + [-1] * 10)
    mine_N = np.array([0] * 37 + [-1] * 3 + [0] * 10)
    pair = Pair("balanced_accuracy", true_N, mine_N, theirs_N, 1)
    assert (pair.swapped(0) >= 0.14 - 1e-12).mean() == pytest.approx(float(tests.mcnemar(10, 3)), abs=0.015)


def test_the_bootstrap_has_the_spread_of_the_mean() -> None:
    values_N = np.random.default_rng(1).normal(size=3000).astype(np.float32)
    means_B = bootstrap(3000, lambda weights_NB: values_N @ weights_NB / 3000, seed=0)
    assert means_B.shape == (2000,)
    assert means_B.std() == pytest.approx(values_N.std() / 3000**0.5, rel=0.06)
    low, high = bounds(means_B, 0.95)
    assert high - low == pytest.approx(2 * 1.645 * values_N.std() / 3000**0.5, rel=0.1)
