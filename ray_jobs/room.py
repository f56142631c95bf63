"""Whether the machines of a cluster have room for what a search will ask of them, and if not, what is missing. Pure, without Ray.

Sums over the cluster would say yes too often: a GPU on one machine and free CPUs on another are no place for a trial that needs both.
What other commands use at the moment does not count: who waits for them gets a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra.errors import UserError
from ray_jobs.spec import Spec

Machine = Mapping[str, float]
"""What one machine has in all, by Ray's names of resources."""

TRIALS_A_GPU = 4
LOADER_CPUS_PER_GPU = 8
ENOUGH = 1e-6
"""Fractions of a GPU add up to it nearly."""


@dataclass(frozen=True)
class Demand:
    """`count` processes at the same time, each of which reserves `each` on one machine."""

    what: str
    each: Mapping[str, float]
    count: int = 1

    def __str__(self) -> str:
        amounts = " and ".join(in_words(name, amount) for name, amount in self.each.items())
        return f"{self.what} needs {amounts}" if self.count == 1 else f"{self.what} needs {self.count} workers of {amounts} each"


def require_room(spec: Spec, machines: Sequence[Machine], *, fits: bool) -> None:
    """Raise UserError where a trial can never start or, with `fits`, the fit after the search: better now than when it waits forever."""
    demands = [Demand("A trial of the search", trial_resources(machines))]
    if fits:
        demands.append(fit_demand(spec.fit.workers_to_begin, machines))
    for demand in demands:
        require(demand, machines)


def require(demand: Demand, machines: Sequence[Machine]) -> None:
    """Raise UserError, naming what is missing, where the demand can never be met."""
    missing = missing_for(demand, machines)
    if missing:
        lower = "Lower fit.num_workers in the spec, or set fit.min_workers, or give" if demand.count > 1 else "Give"
        raise UserError(f"{demand}, but the cluster has {missing}.", f"{lower} Ray more machines (the embedded one: UNFREEZE_NUM_CPUS).")


def missing_for(demand: Demand, machines: Sequence[Machine]) -> str | None:
    """What the cluster has too little of, in words that follow "the cluster has"; None where there is room."""
    if sum(places(demand.each, machine) for machine in machines) >= demand.count:
        return None
    if not machines:
        return "no machine"
    short = [name for name in demand.each if sum(places({name: demand.each[name]}, machine) for machine in machines) < demand.count]
    if short:
        return " and ".join(_had(name, demand.each[name], machines) for name in short)
    room = sum(places(demand.each, machine) for machine in machines)
    names = " and ".join(f"{name}s" for name in demand.each)
    return f"room for {room} where {names} are on one machine"


def places(each: Mapping[str, float], machine: Machine) -> int:
    """How many such processes fit on one machine."""
    return min((int(machine.get(name, 0.0) / amount + ENOUGH) for name, amount in each.items() if amount > 0), default=0)


def trial_resources(machines: Iterable[Machine]) -> dict[str, float]:
    """What one trial reserves: a share of a GPU where the cluster has any."""
    return {"CPU": 1, "GPU": 1 / TRIALS_A_GPU} if total("GPU", machines) >= 1 else {"CPU": 1}


def fit_demand(workers: int, machines: Sequence[Machine]) -> Demand:
    """What the fit reserves: a GPU a worker where the cluster has any, with as many CPUs to load images as fit beside each."""
    if total("GPU", machines) < 1:
        return Demand("The fit", {"CPU": 1}, workers)
    most = min(LOADER_CPUS_PER_GPU, int(max(machine.get("CPU", 0.0) for machine in machines)))
    tried = (Demand("The fit", {"GPU": 1, "CPU": float(cpus)}, workers) for cpus in range(most, 0, -1))
    return next((demand for demand in tried if missing_for(demand, machines) is None), Demand("The fit", {"GPU": 1, "CPU": 1}, workers))


def demand_now(begun: Demand, workers: int, least: int, machines: Sequence[Machine]) -> Demand:
    """What a fit that began with `begun` reserves now, when machines have gone or come: as many of its `workers` as there is room for.

    Where there is not even room for `least`, it asks for those, and so waits for a machine. What it computes on stays the same.
    """
    each = dict.fromkeys(begun.each, 1.0)
    count = min(workers, sum(places(each, machine) for machine in machines))
    if count < least:
        return Demand(begun.what, each, least)
    return fit_demand(count, machines) if "GPU" in each else Demand(begun.what, each, count)


def total(resource: str, machines: Iterable[Machine]) -> float:
    """Of all machines together."""
    return sum(machine.get(resource, 0.0) for machine in machines)


def _had(name: str, amount: float, machines: Sequence[Machine]) -> str:
    """How much of a resource there is: in all, or on the largest machine where no machine has enough for one process."""
    largest = max(machine.get(name, 0.0) for machine in machines)
    if 0 < largest < amount - ENOUGH and total(name, machines) >= amount:
        return f"{in_words(name, largest)} at most on one machine"
    return in_words(name, total(name, machines))


def in_words(name: str, amount: float) -> str:
    return f"{amount:g} {name}{'s' * (amount != 1)}"
