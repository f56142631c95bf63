"""How long a trial may train: successive halving on every epoch's metric, and the depth ladder. Pure rules: no Ray, no torch, no clock.

Every decision depends on the records alone, never on the order in which results arrive, so that a search that was killed and
taken up again, or that ran on more workers, ends with the same outcome.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ray_jobs.search import TrialRecord, percent

GRACE, REDUCTION_FACTOR = 2, 3


@dataclass(frozen=True)
class RungResult:
    """One trial's judgement at one rung. `cutoff` is None where nobody came before it."""

    trial_id: str
    rung: int
    accuracy: float
    cutoff: float | None
    stopped: bool

    @property
    def reason(self) -> str:
        if self.cutoff is None:
            return "the first at this rung"
        sign = "below" if self.stopped else "at or above"
        cutoff = f"the cutoff {percent(self.cutoff)} of the trials before it"
        return f"val accuracy {percent(self.accuracy)} after {self.rung} epochs, {sign} {cutoff}"


def rungs(max_epochs: int, reduction_factor: int = REDUCTION_FACTOR) -> tuple[int, ...]:
    """The epochs after which trials are judged: 2, 6, 18, ... below `max_epochs`.

    Not after one epoch: what has just been unfrozen first falls behind, while BatchNorm's statistics move to the new data.
    """
    first = min(GRACE, max_epochs - 1)
    found = []
    while 1 <= first < max_epochs:
        found.append(first)
        first *= reduction_factor
    return tuple(found)


@dataclass
class Halving:
    """Successive halving by rungs (Li et al. 2018, arXiv:1810.05934), with decisions that do not depend on timing.

    A trial is compared at a rung with those of its cohort that *started* before it, not with those that happened to arrive
    before it. Where one of those has not come so far yet, the trial goes on meanwhile, and the judgement is made good later: its
    record is then cut at the rung.
    """

    max_epochs: int
    cohort_of: Callable[[TrialRecord], int] = lambda record: 0
    reduction_factor: int = REDUCTION_FACTOR
    judged: list[RungResult] = field(default_factory=list)
    _next: dict[tuple[int, int], int] = field(default_factory=dict)
    _seen: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def judge(self, records: Sequence[TrialRecord]) -> None:
        """Make every judgement that can be made by now; a stopped trial gets its `stopped_after` and reason."""
        for cohort in {self.cohort_of(record) for record in records}:
            limit = len(records)
            for rung in rungs(self.max_epochs, self.reduction_factor):
                limit = self._judge_at((rung, cohort), records[:limit])

    def _judge_at(self, place: tuple[int, int], records: Sequence[TrialRecord]) -> int:
        """Judge in the order of start, up to the first that has not come so far; how many are done with at this rung."""
        rung, cohort = place
        index = self._next.get(place, 0)
        while index < len(records):
            record = records[index]
            if self.cohort_of(record) == cohort and not record.is_out_before(rung):
                if len(record.curve) < rung:
                    break
                self._judge_one(record, rung, place)
            index += 1
        self._next[place] = index
        return index

    def _judge_one(self, record: TrialRecord, rung: int, place: tuple[int, int]) -> None:
        seen = self._seen.setdefault(place, [])
        accuracy = record.curve[rung - 1].val_accuracy
        cutoff = quantile(seen, 1 - 1 / self.reduction_factor) if seen else None
        result = RungResult(record.trial_id, rung, accuracy, cutoff, stopped=cutoff is not None and accuracy < cutoff)
        bisect.insort(seen, accuracy)
        self.judged.append(result)
        if result.stopped:
            record.stopped_after, record.status, record.reason = rung, None, result.reason  # what came after never happened


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, with linear interpolation."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Climb:
    """Whether the next depth is worth its cost, and why."""

    pays: bool
    reason: str


def climb(records: Sequence[TrialRecord], depth: int, next_depth: int, val_images: int) -> Climb:
    """Go from `depth` to `next_depth` if the best of `depth` beats the best of all shallower ones by more than half a standard error.

    The first step is always taken. NaN never pays: a depth without a usable trial ends the ladder.
    """
    here = best_accuracy(records, lambda d: d == depth)
    below = best_accuracy(records, lambda d: d < depth)
    if here is None:
        return Climb(False, f"no trial of depth {depth} came through, so depth {next_depth} was not tried")
    if below is None:
        return Climb(True, f"depth {depth} is the first; depth {next_depth} is tried")
    error = math.sqrt(max(below * (1 - below), 1e-4) / max(val_images, 1))
    gained = f"depth {depth} gained {100 * (here - below):+.1f} points over shallower depths (val {percent(here)})"
    if here - below > error / 2:
        return Climb(True, f"{gained}: depth {next_depth} is tried")
    noise = f"no more than half a standard error ({50 * error:.1f} points)"
    return Climb(False, f"{gained}, {noise}: depth {next_depth} and deeper were not tried")


def best_accuracy(records: Sequence[TrialRecord], of_depth: Callable[[int], bool]) -> float | None:
    """The best val accuracy among the usable trials of these depths."""
    found = [r.accuracy for r in records if of_depth(r.config.unfreeze_depth) and not r.failed and r.accuracy is not None]
    return max(found, default=None)
