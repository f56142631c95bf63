"""Which trial starts next: a list made beforehand, Optuna's TPE, or the depth ladder. No Ray, no torch, no clock.

A proposal depends on the records of earlier trials alone, so that a search taken up again proposes the same. Where it needs the
outcome of a trial that still runs, it waits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from ray_jobs.fidelity import climb
from ray_jobs.search import TrialRecord, ranked
from ray_jobs.search_space import TrialConfig, dimensions, sampled, trial_configs, warm_places
from ray_jobs.spec import Range, SearchSpec


class Pause(Enum):
    """Why there is no proposal."""

    WAIT = "wait for a trial that still runs"
    DONE = "no more trials"


class Proposer(Protocol):
    """Makes the trials of a search, one after the other."""

    notes: list[str]

    def propose(self, records: Sequence[TrialRecord]) -> TrialConfig | Pause:
        """The next trial, after those of `records`."""
        ...


def proposer_of(search: SearchSpec, *, lanes: int, val_images: int, warm: Sequence[TrialConfig] = ()) -> Proposer:
    """The proposer that the spec asks for. `lanes` is how many trials run at a time."""
    if search.scheduler == "ladder":
        return Ladder(search, val_images, tuple(warm))
    if search.resolved_searcher == "optuna":
        return Tpe(search, lanes, tuple(warm))
    return Listed(trial_configs(search, warm=warm))


def expected_trials(search: SearchSpec) -> int:
    """How many trials to expect at most."""
    return len(trial_configs(search)) if search.resolved_searcher == "grid" else search.num_trials


@dataclass
class Listed:
    """Trials known beforehand: grid and random."""

    configs: Sequence[TrialConfig]
    notes: list[str] = field(default_factory=list)

    def propose(self, records: Sequence[TrialRecord]) -> TrialConfig | Pause:
        return self.configs[len(records)] if len(records) < len(self.configs) else Pause.DONE


@dataclass
class Tpe:
    """Optuna's TPE (Bergstra et al. 2011). Trial i knows the outcome of trials up to i - lanes, whatever else has ended by then."""

    search: SearchSpec
    lanes: int
    warm: tuple[TrialConfig, ...]
    notes: list[str] = field(default_factory=list)
    _study: Any = None
    _told: int = 0

    def propose(self, records: Sequence[TrialRecord]) -> TrialConfig | Pause:
        number = len(records)
        if number >= self.search.num_trials:
            return Pause.DONE
        known = max(0, number - self.lanes + 1)
        if not all(record.is_over(self.search.max_epochs) for record in records[:known]):
            return Pause.WAIT
        self._tell(records[:known])
        again = list(dict.fromkeys(self.warm))[: warm_places(self.search)]
        if number < len(again):
            return again[number]
        return self._ask(number)

    def _tell(self, records: Sequence[TrialRecord]) -> None:
        import optuna

        study, space = self._study_and_space()
        for record in records[self._told :]:
            if record.accuracy is not None and not record.failed:
                params = {name: getattr(record.config, name) for name in space}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=record.accuracy))
        self._told = max(self._told, len(records))

    def _ask(self, number: int) -> TrialConfig:
        """A sampler of its own for each trial, so that its draws depend on nothing that was drawn before."""
        import optuna

        study, space = self._study_and_space()
        startup = max(4, 2 * len(self.search.unfreeze_depth))
        study.sampler = optuna.samplers.TPESampler(seed=self.search.seed * 100_003 + number, n_startup_trials=startup)
        asked = study.ask(space)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # what it came to is added later, in order
        fixed = {name: values[0] for name, values in dimensions(self.search).items() if not isinstance(values, Range)}
        return TrialConfig(**(fixed | asked.params))

    def _study_and_space(self) -> tuple[Any, dict[str, Any]]:
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self._study = optuna.create_study(direction="maximize")
        space: dict[str, Any] = {}
        for name, values in dimensions(self.search).items():
            if isinstance(values, Range):
                space[name] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.scale == "log")
            elif len(values) > 1 or name in ("unfreeze_depth", "lr"):
                space[name] = optuna.distributions.CategoricalDistribution(values)
        return self._study, space


@dataclass
class Ladder:
    """Cheap depths first, deeper ones only where the evidence pays.

    The linear probes and the first deep depth get the whole width of the search; each further depth half of the last, around the
    learning rates that were best so far. It is climbed only while depth pays (fidelity.climb).
    """

    search: SearchSpec
    val_images: int
    warm: tuple[TrialConfig, ...] = ()
    notes: list[str] = field(default_factory=list)

    def propose(self, records: Sequence[TrialRecord]) -> TrialConfig | Pause:
        depths = sorted(self.search.unfreeze_depth)
        stage = max((depths.index(record.config.unfreeze_depth) for record in records), default=0)
        first = next((i for i, r in enumerate(records) if r.config.unfreeze_depth == depths[stage]), len(records))
        wanted = self._wanted(depths, stage, records[:first])
        if len(records) - first < len(wanted) and len(records) < self._most(depths):
            return wanted[len(records) - first]
        if stage + 1 == len(depths) or len(records) >= self._most(depths):
            return Pause.DONE
        if not all(record.is_over(self.search.max_epochs) for record in records):
            return Pause.WAIT
        verdict = climb(records, depths[stage], depths[stage + 1], self.val_images)
        if verdict.reason not in self.notes:
            self.notes.append(verdict.reason)
        return self._wanted(depths, stage + 1, records)[0] if verdict.pays else Pause.DONE

    def _most(self, depths: Sequence[int]) -> int:
        return self.search.num_trials if self.search.resolved_searcher == "random" else sum(len(self._all_of(depth)) for depth in depths)

    def _all_of(self, depth: int) -> list[TrialConfig]:
        """Every candidate of one depth, as the grid or the sample has them."""
        if self.search.resolved_searcher == "random":
            return [c for c in sampled(self.search, self.search.num_trials) if c.unfreeze_depth == depth]
        return [config for config in trial_configs(self.search) if config.unfreeze_depth == depth]

    def _wanted(self, depths: Sequence[int], stage: int, before: Sequence[TrialRecord]) -> list[TrialConfig]:
        """The trials of a stage, from the records of the stages before it."""
        candidates = self._all_of(depths[stage])
        warm = [config for config in self.warm if config.unfreeze_depth == depths[stage]]
        deep_stage = stage - (depths[0] == 0)
        good = [record for record in ranked(before) if record.config.unfreeze_depth > 0 and not record.failed][:2]
        if deep_stage < 1 or not good:
            return list(dict.fromkeys([*warm[: len(candidates) // 2], *candidates]))[: max(len(candidates), 1)]
        width = max(2, math.ceil(len(candidates) / 2**deep_stage))
        near = _near(candidates, good, depths[stage], random.Random(self.search.seed + stage), self.search.lr)
        return list(dict.fromkeys([*warm[: width // 2], *near]))[:width]


def _near(
    candidates: Sequence[TrialConfig], good: Sequence[TrialRecord], depth: int, rng: random.Random, lr: Range | tuple[float, ...]
) -> list[TrialConfig]:
    """Candidates around the best learning rates so far, nearest first: those of a list, or over a range the best ones moved a little."""
    best = good[0].config
    if isinstance(lr, tuple):
        return sorted(candidates, key=lambda c: (abs(math.log(c.lr / best.lr)), c.lr))
    moved = [replace(r.config, unfreeze_depth=depth) for r in good]
    while len(moved) < len(candidates):
        rate = min(lr.high, max(lr.low, best.lr * math.exp(rng.gauss(0, 0.7))))
        moved.append(replace(candidates[len(moved)], lr=rate))
    return moved
