"""The plain decisions of a search: which trials, how each ended, which is best."""

from __future__ import annotations

import io
import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from ray_jobs import search
from ray_jobs.search import Epoch, TrialConfig, TrialRecord
from ray_jobs.spec import LrRange, SearchSpec

RANGE = LrRange(low=1e-4, high=1e-2)


def record(number: int, depth: int, lr: float, *accuracies: float, loss: float = 1.0) -> TrialRecord:
    curve = [Epoch(i, accuracy, loss, loss, 0.1) for i, accuracy in enumerate(accuracies, 1)]
    return TrialRecord(f"{number:05d}", TrialConfig(depth, lr), curve=curve)


def test_the_same_spec_gives_the_same_trials_and_another_seed_gives_others() -> None:
    spec = SearchSpec(unfreeze_depth=(0, 1, 2, 4), lr=RANGE, num_trials=16, seed=3)
    assert search.trial_configs(spec) == search.trial_configs(spec.model_copy())
    assert search.trial_configs(spec) != search.trial_configs(spec.model_copy(update={"seed": 4}))


@given(st.sets(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 1000))
def test_a_random_search_spreads_its_trials_over_depths_and_over_the_range(depths: set[int], num_trials: int, seed: int) -> None:
    configs = search.trial_configs(SearchSpec(unfreeze_depth=tuple(depths), lr=RANGE, num_trials=num_trials, seed=seed))
    assert len(configs) == num_trials
    counts = {depth: [c.lr for c in configs if c.unfreeze_depth == depth] for depth in depths}
    assert max(map(len, counts.values())) - min(map(len, counts.values())) <= 1
    for rates in counts.values():
        parts = sorted(math.floor(len(rates) * math.log(rate / 1e-4) / math.log(100) * (1 - 1e-12)) for rate in rates)
        assert parts == list(range(len(rates)))


def test_a_grid_runs_each_combination_once_with_cheap_depths_first() -> None:
    configs = search.trial_configs(SearchSpec(unfreeze_depth=(2, 0), lr=(1e-3, 1e-2), searcher="grid", num_trials=1))
    assert configs == [TrialConfig(0, 1e-3), TrialConfig(0, 1e-2), TrialConfig(2, 1e-3), TrialConfig(2, 1e-2)]


def test_a_random_search_over_a_list_of_rates_uses_each_before_it_repeats_one() -> None:
    configs = search.trial_configs(SearchSpec(unfreeze_depth=(1,), lr=(1e-4, 1e-3, 1e-2), searcher="random", num_trials=5))
    assert {c.lr for c in configs[:3]} == {1e-4, 1e-3, 1e-2}
    assert len(configs) == 5


def test_probe_rates_are_the_list_of_the_spec_or_a_few_above_its_range() -> None:
    assert search.probe_learning_rates((1e-2, 1e-3)) == [1e-3, 1e-2]
    rates = search.probe_learning_rates(RANGE)
    assert rates[0] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-2)
    assert len(rates) == 4
    assert max(search.probe_learning_rates(LrRange(low=0.5, high=5))) <= search.PROBE_LR_CAP


def test_the_best_trial_is_chosen_by_accuracy_then_loss_then_depth() -> None:
    worse, deep = record(0, 0, 1e-3, 0.7), record(1, 4, 1e-3, 0.6, 0.8)
    shallow, lossy = record(2, 1, 1e-3, 0.8), record(3, 0, 1e-3, 0.8, loss=1.5)
    assert search.best_trial([worse, deep, shallow, lossy]) is shallow
    assert search.ranked([worse, deep, shallow, lossy]) == [shallow, deep, lossy, worse]


def test_a_diverged_trial_never_wins_and_a_search_of_nothing_else_says_why() -> None:
    diverged, fine = record(0, 2, 1.0, 0.99), record(1, 0, 1e-3, 0.5)
    diverged.status, diverged.reason = "diverged", "the loss became nan in epoch 2"
    assert search.best_trial([diverged, fine]) is fine
    assert search.ranked([diverged, fine])[-1] is diverged
    with pytest.raises(UserError, match="the loss became nan in epoch 2"):
        search.best_trial([diverged])


def test_a_trial_cut_short_is_stopped_and_one_that_ran_through_is_finished() -> None:
    assert search.ended(record(0, 0, 1e-3, 0.5, 0.6), max_epochs=3) == "stopped"
    assert search.ended(record(0, 0, 1e-3, 0.5, 0.6, 0.7), max_epochs=3) == "finished"


@pytest.mark.parametrize(("error", "status"), [
    ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory", "out_of_memory"),
    ("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "out_of_memory"),
    ("ValueError: shapes do not match", "failed"),
])  # fmt: skip
def test_the_status_of_a_dead_trial_tells_memory_from_other_causes(error: str, status: str) -> None:
    assert search.status_of_error(error) == status


def test_the_tables_hold_a_row_an_epoch_and_a_row_a_trial_best_first() -> None:
    empty = record(2, 1, 1.0)
    empty.status = "diverged"
    details = [search.trial_detail(r, 2) for r in search.ranked([record(0, 0, 1e-3, 0.5, 0.4), empty, record(1, 2, 1e-3, 0.9)])]
    epochs = pq.read_table(io.BytesIO(search.epochs_table(details))).to_pylist()
    board = pq.read_table(io.BytesIO(search.leaderboard_table(details))).to_pylist()
    found = [(row["trial_id"], row["epoch"], row["val_accuracy"]) for row in epochs]
    assert found == [("00001", 1, 0.9), ("00000", 1, 0.5), ("00000", 2, 0.4)]
    assert [(row["rank"], row["unfreeze_depth"], row["accuracy"], row["status"]) for row in board] == [
        (1, 2, 0.9, "stopped"), (2, 0, 0.5, "finished"), (3, 1, None, "diverged"),
    ]  # fmt: skip


def test_flops_count_three_forwards_where_trained_and_one_where_frozen() -> None:
    details = [{"unfreeze_depth": 1, "epochs": 2}]
    shared, unshared = search.flops_counted(details, suffix={0: 1, 1: 10}, whole=100, train=5, val=1)
    assert shared == 6 * 99 + 2 * (3 * 5 + 1) * 10
    assert unshared == 2 * ((3 * 5 + 1) * 10 + 6 * 90)
