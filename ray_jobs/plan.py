"""Which cuts of a search to materialise, and what the search will cost: from measured facts, exactly, in milliseconds. Pure.

A depth without a cut of its own starts from the nearest materialised cut at a larger depth, or from the pixels, and runs the frozen
groups between in every epoch. Times are seconds on one worker's core or GPU, sizes bytes; a depth counts the groups that train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ray_jobs.fidelity import GRACE, REDUCTION_FACTOR

State = tuple[float, int, tuple[int, ...]]
"""Seconds, bytes and cuts of a part of a plan."""


@dataclass(frozen=True)
class DepthCost:
    """What one image costs at one depth."""

    prefix_s: float
    """Its pixels to this cut, in the shared pass."""
    frozen_s: float
    """This cut to the logits, in eval mode, as a trial runs it."""
    train_s: float
    """A training step of this depth's suffix."""
    size_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What was measured on this kind of machine: the search's depths and the pixels (under `num_groups`)."""

    num_groups: int
    depths: dict[int, DepthCost]
    decode_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    seconds: float = 0.0
    """What the calibration itself took."""

    def to_plain(self) -> dict[str, object]:
        """Plain values for JSON, whose keys are strings."""
        return {**asdict(self), "depths": {str(depth): asdict(cost) for depth, cost in self.depths.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, object]) -> Calibration:
        """The way back."""
        values = dict(plain)
        depths: Mapping[str, Mapping[str, float]] = values.pop("depths")  # type: ignore[assignment]  # as written above
        return cls(depths={int(depth): DepthCost(**cost) for depth, cost in depths.items()}, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Workload:
    """The search to plan: trials by depth, the epochs that each is expected to run, and who runs them."""

    trials: dict[int, int]
    epochs: float
    train: int
    val: int
    views: int = 1
    workers: int = 1


HARDLY_MORE = 1.05
TRIAL_S = 0.03
"""What Tune, the journal and the lanes take for a trial beside its training, whatever the plan (benchmarks/trial_overhead.py)."""


@dataclass(frozen=True)
class Plan:
    """The cuts to materialise, where each depth starts from, and the estimate. The pixels are always there, and in no count."""

    materialise: tuple[int, ...]
    source: dict[int, int]
    prefix_s: float
    trials_s: float
    memory_bytes: int

    @property
    def estimated_s(self) -> float:
        return self.prefix_s + self.trials_s


def plan(facts: Calibration, work: Workload, memory_bytes: float = math.inf) -> Plan:
    """The cheapest plan within the memory, over every subset of the search's cuts.

    Dynamic programming from small depths to the pixels: `states[i]` are the undominated (seconds, bytes, cuts) in which cut i is
    the largest and every wanted depth up to it has its source.
    """
    wanted = sorted(work.trials)
    ends = [*(depth for depth in wanted if depth != facts.num_groups), facts.num_groups]
    states: dict[int, list[State]] = {}
    for end in ends:
        size = 0 if end == facts.num_groups else _rows(work) * facts.depths[end].size_bytes
        store_s = size / facts.write_bytes_per_s / work.workers
        first_s = _pass_s(facts, work, end) + store_s + _used_s(facts, work, [d for d in wanted if d <= end], end)
        found: list[State] = [(first_s, size, (end,))]
        for before in (other for other in ends if other < end):
            use_s = _used_s(facts, work, [d for d in wanted if before < d <= end], end)
            found += [(seconds + store_s + use_s, total + size, (*cuts, end)) for seconds, total, cuts in states[before]]
        states[end] = _undominated([state for state in found if state[1] <= memory_bytes])
    return evaluate(facts, work, states[facts.num_groups][0][2])


def steady_plan(facts: Calibration, work: Workload, memory_bytes: float = math.inf) -> Plan:
    """Every wanted cut materialised, where that fits and costs hardly more than the cheapest plan; else the cheapest.

    A trial from another cut computes its frozen part by other kernels; training amplifies their rounding. So the plan, and with it the
    search's outcome, should not turn on the noise of a calibration.
    """
    best, whole = plan(facts, work, memory_bytes), evaluate(facts, work, list(work.trials))
    fits = whole.memory_bytes <= memory_bytes
    return whole if fits and whole.estimated_s <= HARDLY_MORE * best.estimated_s else best


def evaluate(facts: Calibration, work: Workload, cuts: Sequence[int]) -> Plan:
    """The plan that materialises these cuts, whatever it costs."""
    chosen = tuple(sorted({cut for cut in cuts if cut != facts.num_groups}))
    source = {depth: min(cut for cut in (*chosen, facts.num_groups) if cut >= depth) for depth in sorted(work.trials)}
    size = sum(_rows(work) * facts.depths[cut].size_bytes for cut in chosen)
    prefix_s = _pass_s(facts, work, min(chosen, default=facts.num_groups)) + size / facts.write_bytes_per_s / work.workers
    trials_s = sum(_used_s(facts, work, [depth], start) + work.trials[depth] * TRIAL_S for depth, start in source.items())
    return Plan(chosen, source, prefix_s, trials_s, size)


def expected_epochs(scheduler: str, max_epochs: int, trials: int) -> float:
    """Epochs that a trial runs on average. fifo: all. asha: each rung keeps a third, and the first trials to reach it, who meet no rival.

    The k-th of n trials at a rung passes with probability 1/3 + 2/3 / k where they come in any order.
    """
    if scheduler == "fifo" or max_epochs <= GRACE:
        return float(max_epochs)
    rung, reaching, epochs = GRACE, float(max(trials, 1)), float(GRACE)
    while rung < max_epochs:
        count = max(1, round(reaching))
        passing = sum(1 / REDUCTION_FACTOR + (1 - 1 / REDUCTION_FACTOR) / k for k in range(1, min(count, 10_000) + 1)) / min(count, 10_000)
        reaching *= min(1.0, passing)
        following = min(rung * REDUCTION_FACTOR, max_epochs)
        epochs += reaching / max(trials, 1) * (following - rung)
        rung = following
    return epochs


def _rows(work: Workload) -> int:
    """Rows of a cut: every view of a train image, and the plain val images."""
    return work.train * work.views + work.val


def _pass_s(facts: Calibration, work: Workload, reach: int) -> float:
    """Decoding everything once, and the frozen front up to the smallest materialised depth."""
    return _rows(work) * (facts.decode_s + facts.depths[reach].prefix_s) / work.workers


def _used_s(facts: Calibration, work: Workload, depths: Sequence[int], source: int) -> float:
    """All epochs of the trials at these depths, started from the source."""
    start, total = facts.depths[source], 0.0
    for depth in depths:
        own = facts.depths[depth]
        between_s = max(0.0, start.frozen_s - own.frozen_s) + start.size_bytes / facts.read_bytes_per_s
        epoch_s = work.train * (own.train_s + between_s) + work.val * (own.frozen_s + between_s)
        trials = work.trials[depth]
        total += trials * work.epochs * epoch_s / min(work.workers, trials)
    return total


def _undominated(states: list[State]) -> list[State]:
    """Fastest first; each later one needs less memory than all before it."""
    kept: list[State] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept
