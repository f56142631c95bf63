"""The trials of a grid and of a random search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.search_space import PROBE_LR_CAP, TrialConfig, point_of, probe_configs, probe_learning_rates, trial_configs
from ray_jobs.spec import BackboneSpec, Range, SearchSpec

RANGE = Range(low=1e-4, high=1e-2)


def test_the_same_spec_gives_the_same_trials_and_another_seed_gives_others() -> None:
    spec = SearchSpec(unfreeze_depth=(0, 1, 2, 4), lr=RANGE, num_trials=16, seed=3)
    assert trial_configs(spec) == trial_configs(spec.model_copy())
    assert trial_configs(spec) != trial_configs(spec.model_copy(update={"seed": 4}))


@given(st.sets(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 1000))
def test_a_random_search_spreads_its_trials_over_depths_and_over_the_range(depths: set[int], num_trials: int, seed: int) -> None:
    configs = trial_configs(SearchSpec(unfreeze_depth=tuple(depths), lr=RANGE, num_trials=num_trials, seed=seed))
    assert len(configs) == num_trials
    counts = {depth: [c.lr for c in configs if c.unfreeze_depth == depth] for depth in depths}
    assert max(map(len, counts.values())) - min(map(len, counts.values())) <= 1
    for rates in counts.values():
        parts = sorted(math.floor(len(rates) * math.log(rate / 1e-4) / math.log(100) * (1 - 1e-12)) for rate in rates)
        assert parts == list(range(len(rates)))


def test_a_grid_runs_each_combination_once_with_cheap_depths_first() -> None:
    configs = trial_configs(SearchSpec(unfreeze_depth=(2, 0), lr=(1e-3, 1e-2), searcher="grid", num_trials=1))
    assert configs == [TrialConfig(0, 1e-3), TrialConfig(0, 1e-2), TrialConfig(2, 1e-3), TrialConfig(2, 1e-2)]


def test_a_random_search_over_a_list_of_rates_uses_each_before_it_repeats_one() -> None:
    configs = trial_configs(SearchSpec(unfreeze_depth=(1,), lr=(1e-4, 1e-3, 1e-2), searcher="random", num_trials=5))
    assert {c.lr for c in configs[:3]} == {1e-4, 1e-3, 1e-2}
    assert len(configs) == 5


def test_a_dimension_that_is_not_searched_leaves_the_draws_of_the_others_alone() -> None:
    plain = trial_configs(SearchSpec(lr=RANGE, num_trials=9))
    wide = trial_configs(SearchSpec(lr=RANGE, num_trials=9, augmentation_strength=0.5))
    assert [replace(config, augmentation_strength=1.0) for config in wide] == plain
    assert {config.augmentation_strength for config in wide} == {0.5}


def test_a_strength_is_drawn_from_its_range_and_listed_in_a_grid() -> None:
    drawn = trial_configs(SearchSpec(lr=(1e-3,), augmentation_strength=Range(low=0.2, high=0.8, scale="linear"), num_trials=9))
    assert len({config.augmentation_strength for config in drawn}) == 9
    assert all(0.2 <= config.augmentation_strength <= 0.8 for config in drawn)
    grid = trial_configs(SearchSpec(unfreeze_depth=(1,), lr=(1e-3,), augmentation_strength=(0.0, 1.0)))
    assert [config.augmentation_strength for config in grid] == [0.0, 1.0]


def test_a_grid_crosses_every_backbone_with_every_other_dimension() -> None:
    configs = trial_configs(SearchSpec(unfreeze_depth=(0, 1), lr=(1e-3, 1e-2), backbone=("resnet34", BackboneSpec(name="vit"))))
    assert len(configs) == len(set(configs)) == 12
    assert [config.backbone for config in configs[:3]] == ["", "resnet34", "vit"]


@given(st.integers(1, 40), st.integers(0, 1000))
def test_a_random_search_gives_the_backbones_equal_shares_of_each_depth(num_trials: int, seed: int) -> None:
    search = SearchSpec(unfreeze_depth=(0, 2), lr=RANGE, num_trials=num_trials, seed=seed, backbone=("resnet34",))
    for depth in (0, 2):
        names = [config.backbone for config in trial_configs(search) if config.unfreeze_depth == depth]
        assert abs(names.count("") - names.count("resnet34")) <= 1


def test_every_backbone_has_the_same_probes_under_its_own_name() -> None:
    search = SearchSpec(lr=RANGE, backbone=("resnet34",))
    assert [replace(probe, backbone="") for probe in probe_configs(search, "resnet34")] == probe_configs(search)
    assert {probe.backbone for probe in probe_configs(search, "resnet34")} == {"resnet34"}


def test_the_record_of_a_trial_from_before_a_dimension_gives_the_point_that_was_trained() -> None:
    assert point_of({"unfreeze_depth": 1, "lr": 1e-3, "optimizer": "sgd", "accuracy": 0.5}) == TrialConfig(1, 1e-3, optimizer="sgd")


def test_probe_rates_are_the_list_of_the_spec_or_a_few_above_its_range() -> None:
    assert probe_learning_rates((1e-2, 1e-3)) == [1e-3, 1e-2]
    rates = probe_learning_rates(RANGE)
    assert rates[0] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-2)
    assert len(rates) == 4
    assert max(probe_learning_rates(Range(low=0.5, high=5))) <= PROBE_LR_CAP
