"""The planner finds the cheapest cuts, as trying every subset would, and says what the search will cost."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.plan import HARDLY_MORE, TRIAL_S, Calibration, DepthCost, Workload, evaluate, expected_epochs, plan, steady_plan

GROUPS = 8


def facts(costs: dict[int, tuple[float, float, float, int]], decode_s: float = 1e-3, bandwidth: float = 2e9) -> Calibration:
    return Calibration(GROUPS, {depth: DepthCost(*cost) for depth, cost in costs.items()}, decode_s, bandwidth, bandwidth / 4)


def like_a_network(train_s: list[float], sizes: list[int], bandwidth: float) -> Calibration:
    """Depth d trains the last d groups, each of its own cost."""
    frozen = [sum(train_s[: d + 1]) / 3 for d in range(GROUPS + 1)]
    costs = {d: (frozen[-1] - frozen[d], frozen[d], sum(train_s[: d + 1]), sizes[d]) for d in range(GROUPS + 1)}
    return facts(costs, bandwidth=bandwidth)


networks = st.builds(
    like_a_network, st.lists(st.floats(1e-6, 1e-2), min_size=GROUPS + 1, max_size=GROUPS + 1),
    st.lists(st.integers(1_000, 3_000_000), min_size=GROUPS + 1, max_size=GROUPS + 1), st.floats(1e7, 1e10),
)  # fmt: skip
workloads = st.builds(
    Workload, trials=st.dictionaries(st.integers(0, GROUPS), st.integers(1, 20), min_size=1, max_size=5), epochs=st.floats(0.5, 10),
    train=st.integers(1, 5_000), val=st.integers(1, 500), views=st.integers(1, 3), workers=st.integers(1, 4),
)  # fmt: skip


@given(networks, workloads)
def test_the_plan_is_the_best_of_all_subsets_and_so_never_worse_than_all_or_none(known: Calibration, work: Workload) -> None:
    wanted = sorted(work.trials)
    subsets = [cuts for size in range(len(wanted) + 1) for cuts in itertools.combinations(wanted, size)]
    best = min(evaluate(known, work, cuts).estimated_s for cuts in subsets)
    found = plan(known, work)
    assert found.estimated_s == pytest.approx(best)
    either = min(evaluate(known, work, wanted).estimated_s, evaluate(known, work, []).estimated_s)
    assert found.estimated_s <= 1.05 * either


@given(networks, workloads, st.floats(0, 1))
def test_within_a_memory_budget_it_is_the_best_that_fits(known: Calibration, work: Workload, share: float) -> None:
    wanted = sorted(work.trials)
    budget = share * evaluate(known, work, wanted).memory_bytes
    every = [evaluate(known, work, cuts) for size in range(len(wanted) + 1) for cuts in itertools.combinations(wanted, size)]
    found = plan(known, work, budget)
    assert found.memory_bytes <= budget
    assert found.estimated_s == pytest.approx(min(one.estimated_s for one in every if one.memory_bytes <= budget))


@given(networks, workloads)
def test_the_plan_that_is_taken_hardly_costs_more_and_is_that_of_every_cut_wherever_it_can_be(known: Calibration, work: Workload) -> None:
    best, taken, whole = plan(known, work), steady_plan(known, work), evaluate(known, work, list(work.trials))
    assert taken.estimated_s <= HARDLY_MORE * best.estimated_s
    assert (taken == whole) == (whole.estimated_s <= HARDLY_MORE * best.estimated_s or best == whole)


@given(networks, workloads)
def test_every_depth_starts_from_the_nearest_cut_or_from_the_pixels(known: Calibration, work: Workload) -> None:
    found = plan(known, work)
    for depth, source in found.source.items():
        assert source == min(cut for cut in (*found.materialise, GROUPS) if cut >= depth)


def test_a_cut_that_is_read_slower_than_computed_is_left_out() -> None:
    cheap = {0: (0.02, 1e-6, 1e-6, 5_000), 1: (0.01, 0.01, 0.03, 10**9), GROUPS: (0.0, 0.02, 0.06, 30_000)}
    found = plan(facts(cheap), Workload({0: 4, 1: 4}, 8, 1000, 200))
    assert found.materialise == (0,)
    assert found.source == {0: 0, 1: GROUPS}


def test_one_short_trial_is_not_worth_a_pass() -> None:
    costs = {1: (0.01, 0.01, 0.03, 4_000_000_000), GROUPS: (0.0, 0.02, 0.06, 30_000)}
    assert plan(facts(costs), Workload({1: 1}, 1, 1000, 200)).materialise == ()


def test_fifo_runs_every_epoch_and_asha_a_share_that_falls_with_the_number_of_trials() -> None:
    assert expected_epochs("fifo", 8, 12) == 8
    assert expected_epochs("asha", 2, 12) == 2
    shares = [expected_epochs("asha", 16, trials) for trials in (1, 4, 16, 64, 1024)]
    assert shares[0] == 16
    assert shares == sorted(shares, reverse=True)
    assert 2 + 4 / 3 + 10 / 9 < shares[-1] < 5


def test_planning_many_depths_does_not_try_each_of_their_sets() -> None:
    """It would never end."""
    many = Calibration(60, {d: DepthCost(0.06 - 0.001 * d, 0.001 * d, 0.003 * d, 10_000 * d) for d in range(61)}, 1e-3, 1e9, 2e8)
    assert plan(many, Workload(dict.fromkeys(range(61), 3), 8, 10_000, 2_000), memory_bytes=1e9).materialise


def test_a_calibration_survives_json() -> None:
    known = like_a_network([1e-3] * (GROUPS + 1), [1000] * (GROUPS + 1), 1e9)
    assert Calibration.from_plain(json.loads(json.dumps(known.to_plain()))) == known


def test_many_trials_that_train_next_to_nothing_are_not_said_to_be_free() -> None:
    tiny = facts({0: (1e-6, 1e-9, 1e-9, 4), GROUPS: (0.0, 1e-6, 1e-6, 0)})
    found = evaluate(tiny, Workload({0: 1_000}, epochs=1, train=10, val=10), [0])
    assert found.trials_s == pytest.approx(1_000 * TRIAL_S, rel=0.01)
