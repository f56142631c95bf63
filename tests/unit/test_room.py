"""Whether a trial and a fit can start at all on given machines, and what is named where they cannot."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from ray_jobs.room import Demand, Machine, demand_now, fit_demand, missing_for, places, require, require_room, trial_resources
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec

MACHINES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 4).map(float), "GPU": st.integers(0, 2).map(float)}), max_size=3)
EACH = st.fixed_dictionaries({"CPU": st.integers(1, 3).map(float)}, optional={"GPU": st.sampled_from([0.25, 0.5, 1.0])})
DEMANDS = st.builds(Demand, st.just("It"), EACH, st.integers(1, 4))


def spec_with(workers: int) -> Spec:
    data = {"source": "s3://bucket/pets"}
    return parse_spec({"name": "pets", "data": data, "backbone": {"name": "resnet18"}, "fit": {"num_workers": workers}})


def fits_by_trying(demand: Demand, machines: list[Machine]) -> bool:
    """Whether any of all ways to place the processes works."""
    for chosen in itertools.product(range(len(machines)), repeat=demand.count):
        used = [sum(place == number for place in chosen) for number in range(len(machines))]
        enough = (amount * used[i] <= machine.get(name, 0.0) for i, machine in enumerate(machines) for name, amount in demand.each.items())
        if all(enough):
            return True
    return False


@given(DEMANDS, MACHINES)
def test_there_is_room_exactly_where_some_way_to_place_it_works(demand: Demand, machines: list[Machine]) -> None:
    assert (missing_for(demand, machines) is None) == fits_by_trying(demand, machines)


@given(DEMANDS, MACHINES, MACHINES)
def test_another_machine_never_takes_room_away(demand: Demand, machines: list[Machine], more: list[Machine]) -> None:
    assert missing_for(demand, machines) is not None or missing_for(demand, [*machines, *more]) is None


@given(DEMANDS, MACHINES)
def test_what_is_missing_is_named_by_its_resource(demand: Demand, machines: list[Machine]) -> None:
    missing = missing_for(demand, machines)
    if missing is not None and machines:
        assert any(name in missing for name in demand.each)
        with pytest.raises(UserError, match="but the cluster has"):
            require(demand, machines)


@given(st.integers(1, 6), MACHINES)
def test_the_fit_takes_loaders_only_where_that_leaves_room_for_every_worker(workers: int, machines: list[Machine]) -> None:
    demand = fit_demand(workers, machines)
    least = Demand("It", dict.fromkeys(demand.each, 1.0), workers)
    assert (missing_for(demand, machines) is None) == (missing_for(least, machines) is None)


@given(st.integers(1, 6), st.data(), MACHINES, MACHINES)
def test_a_fit_that_has_begun_takes_as_many_workers_as_fit_or_waits_for_the_least(
    workers: int, data: st.DataObject, before: list[Machine], now: list[Machine]
) -> None:
    begun, least = fit_demand(workers, before), data.draw(st.integers(1, workers))
    demand = demand_now(begun, workers, least, now)
    assert demand.each.keys() == begun.each.keys()
    assert least <= demand.count <= workers
    if missing_for(demand, now) is None:
        one_more = Demand("It", dict.fromkeys(begun.each, 1.0), demand.count + 1)
        assert demand.count == workers or missing_for(one_more, now) is not None
    else:
        assert demand.count == least


def test_a_fit_may_begin_with_fewer_workers_only_where_the_spec_says_so() -> None:
    spec = spec_with(3)
    require_room(spec.model_copy(update={"fit": spec.fit.model_copy(update={"min_workers": 2})}), [{"CPU": 2}], fits=True)
    with pytest.raises(UserError, match="needs 3 workers") as caught:
        require_room(spec, [{"CPU": 2}], fits=True)
    assert "fit.min_workers" in caught.value.way_out


def test_the_missing_resource_is_named() -> None:
    with pytest.raises(UserError, match="The fit needs 2 workers of 1 GPU and 1 CPU each, but the cluster has 1 GPU"):
        require(fit_demand(2, [{"CPU": 8, "GPU": 1}]), [{"CPU": 8, "GPU": 1}])
    with pytest.raises(UserError, match="The fit needs 3 workers of 1 CPU each, but the cluster has 2 CPUs"):
        require_room(spec_with(3), [{"CPU": 2}], fits=True)
    with pytest.raises(UserError, match="A trial of the search needs 1 CPU, but the cluster has no machine"):
        require_room(spec_with(1), [], fits=False)


def test_sums_over_machines_do_not_count() -> None:
    apart = [{"CPU": 0.0, "GPU": 1.0}, {"CPU": 16.0}]
    with pytest.raises(UserError, match="the cluster has room for 0 where CPUs and GPUs are on one machine"):
        require_room(spec_with(1), apart, fits=False)
    assert missing_for(Demand("It", {"CPU": 6}), [{"CPU": 4}, {"CPU": 4}]) == "4 CPUs at most on one machine"


def test_a_search_alone_does_not_ask_for_room_for_the_fit() -> None:
    require_room(spec_with(8), [{"CPU": 2}], fits=False)


def test_loaders_stand_where_the_gpus_are() -> None:
    assert fit_demand(2, [{"CPU": 8, "GPU": 2}]).each == {"GPU": 1, "CPU": 4}
    assert fit_demand(2, [{"CPU": 64}, {"CPU": 6, "GPU": 2}]).each == {"GPU": 1, "CPU": 3}
    assert fit_demand(2, [{"CPU": 64}]).each == {"CPU": 1}


def test_four_trials_share_a_gpu() -> None:
    machine = {"CPU": 16.0, "GPU": 2.0}
    assert places(trial_resources([machine]), machine) == 8
