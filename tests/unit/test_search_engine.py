"""Laws of the running search: its outcome depends on what trials measure, never on when, where or how often it was killed."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs.fidelity import Halving, climb, quantile, rungs
from ray_jobs.proposals import Pause, proposer_of
from ray_jobs.search import Epoch, TrialRecord, best_of, best_trial, ended
from ray_jobs.search_engine import SearchEngine
from ray_jobs.search_space import TrialConfig
from ray_jobs.spec import SearchSpec

MAX_EPOCHS = 7


def measured(config: TrialConfig, epoch: int) -> Epoch | None:
    """What a trial would measure: a fixed function of its point; None where it diverges."""
    noise = int.from_bytes(hashlib.sha256(f"{config}{epoch}".encode()).digest()[:4], "big") / 2**32
    if config.lr > 5e-3 and noise > 0.9:
        return None
    accuracy = min(0.95, 0.5 + 0.08 * min(config.unfreeze_depth, 2) + 0.03 * epoch + 0.01 * noise)  # less than half a standard error
    return Epoch(epoch, accuracy, 1 - accuracy, 1 - accuracy, 0.1)


class World:
    """Lanes that run the trials of an engine, in an order and with deaths drawn from a seed."""

    def __init__(self, search: SearchSpec, lanes: int, seed: int, deaths: int) -> None:
        self.search, self.lanes, self.rng, self.deaths = search, lanes, random.Random(seed), deaths
        self.events: list[dict[str, Any]] = []

    def new_engine(self) -> SearchEngine:
        halving = None if self.search.scheduler == "fifo" else Halving(MAX_EPOCHS, cohort_of=self._cohort)
        engine = SearchEngine(proposer_of(self.search, lanes=3, val_images=100), MAX_EPOCHS, halving, self.events.append)
        kept, self.events[:] = json.loads(json.dumps(self.events)), []
        engine.on_event = self.events.append
        engine.restore(kept)
        self.events[:0] = kept
        return engine

    def _cohort(self, record: TrialRecord) -> int:
        return record.config.unfreeze_depth if self.search.scheduler == "ladder" else 0

    def run(self) -> SearchEngine:
        while True:
            engine = self.new_engine()
            if self._run_until_death(engine):
                engine.close()
                return engine

    def _run_until_death(self, engine: SearchEngine) -> bool:
        heads, _ = engine.take_heads()
        running = dict.fromkeys(heads, 0)
        done = False
        while running or not done:
            if self.deaths and self.rng.random() < 0.03:
                self.deaths -= 1
                del self.events[self.rng.randint(len(self.events) // 2, len(self.events)) :]  # the last writes may be lost
                return False
            while len(running) < self.lanes and not done:
                index = engine.next()
                done = index is Pause.DONE
                if isinstance(index, Pause):
                    break
                running[index] = 0
            if running and self._epoch_of(engine, running):
                done = False
        return True

    def _epoch_of(self, engine: SearchEngine, running: dict[int, int]) -> bool:
        """One epoch of a trial drawn at random; True where it ended."""
        index = self.rng.choice(list(running))
        running[index] += 1
        epoch = measured(engine.records[index].config, running[index])
        if epoch is None:
            engine.end(index, "diverged", "the loss became nan")
            over = True
        else:
            over = engine.report(index, epoch, started_at=1, seconds=1.0)
        if over:
            del running[index]
        return over


def outcome(engine: SearchEngine) -> Any:
    rows = [(r.config, len(r.counted), r.accuracy, ended(r, MAX_EPOCHS), r.reason) for r in engine.records]
    return rows, best_of(best_trial(engine.records))


SPECS = {
    "grid, fifo": {"lr": [1e-3, 3e-3, 1e-2], "scheduler": "fifo"},
    "random, asha": {"lr": {"low": 1e-4, "high": 1e-2}, "num_trials": 12, "scheduler": "asha"},
    "optuna, asha": {"lr": {"low": 1e-4, "high": 1e-2}, "num_trials": 10, "searcher": "optuna", "scheduler": "asha"},
    "grid, ladder": {"lr": [1e-4, 1e-3, 3e-3, 1e-2], "scheduler": "ladder"},
    "random, ladder": {"lr": {"low": 1e-4, "high": 1e-2}, "num_trials": 14, "scheduler": "ladder"},
    "grid of backbones, asha": {"lr": [1e-3, 3e-3], "scheduler": "asha", "backbone": ["resnet34"]},
    "optuna over backbones": {"lr": {"low": 1e-4, "high": 1e-2}, "num_trials": 10, "searcher": "optuna", "backbone": ["resnet34", "vit"]},
    "random ladder of backbones": {"lr": {"low": 1e-4, "high": 1e-2}, "num_trials": 14, "scheduler": "ladder", "backbone": ["resnet34"]},
}


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), lanes=st.integers(1, 3), deaths=st.integers(0, 4))
def test_the_outcome_depends_on_neither_timing_nor_lanes_nor_deaths(name: str, seed: int, lanes: int, deaths: int) -> None:
    search = SearchSpec.model_validate({"unfreeze_depth": (0, 1, 2, 3, 4), "max_epochs": MAX_EPOCHS, **SPECS[name]})
    undisturbed = outcome(World(search, lanes=1, seed=0, deaths=0).run())
    assert outcome(World(search, lanes=lanes, seed=seed, deaths=deaths).run()) == undisturbed


def test_a_journal_from_before_a_dimension_is_taken_up_where_it_was() -> None:
    world = World(SearchSpec(unfreeze_depth=(0, 1), lr=(1e-3, 3e-3), max_epochs=MAX_EPOCHS), lanes=1, seed=0, deaths=0)
    undisturbed = outcome(world.run())
    for event in world.events:
        for name in ("augmentation_strength", "backbone"):
            event.get("config", {}).pop(name, None)
    del world.events[len(world.events) // 2 :]
    assert outcome(world.run()) == undisturbed


def test_halving_stops_about_two_thirds_at_a_rung_and_never_the_first() -> None:
    search = SearchSpec(unfreeze_depth=(1,), num_trials=60, max_epochs=MAX_EPOCHS, scheduler="asha")
    engine = World(search, lanes=3, seed=1, deaths=0).run()
    statuses = [ended(record, MAX_EPOCHS) for record in engine.records]
    assert statuses[0] != "stopped"
    assert 25 <= statuses.count("stopped") <= 50
    assert all(len(record.counted) in (2, 6) for record in engine.records if ended(record, MAX_EPOCHS) == "stopped")


def test_the_ladder_stops_where_a_depth_gains_less_than_half_a_standard_error() -> None:
    search = SearchSpec(unfreeze_depth=(0, 1, 2, 3, 4), lr=(1e-3, 3e-3), max_epochs=MAX_EPOCHS, scheduler="ladder")
    engine = World(search, lanes=2, seed=1, deaths=0).run()
    depths = {record.config.unfreeze_depth for record in engine.records}
    assert {0, 1, 2} <= depths
    assert 4 not in depths
    assert "deeper were not tried" in engine.proposer.notes[-1]


def record(depth: int, *accuracies: float, failed: bool = False) -> TrialRecord:
    curve = [Epoch(i, accuracy, 1.0, 1.0, 0.1) for i, accuracy in enumerate(accuracies, 1)]
    return TrialRecord("0", TrialConfig(depth, 1e-3), curve=curve, status="diverged" if failed else None)


def test_climbing_needs_a_gain_beyond_noise_and_a_usable_trial() -> None:
    assert climb([record(0, 0.7)], 0, 1, 400).pays
    assert climb([record(0, 0.7), record(1, 0.8)], 1, 2, 400).pays
    assert not climb([record(0, 0.7), record(1, 0.705)], 1, 2, 400).pays
    assert not climb([record(0, 0.7), record(1, 0.9, failed=True)], 1, 2, 400).pays


@pytest.mark.parametrize(("max_epochs", "expected"), [(1, ()), (2, (1,)), (3, (2,)), (8, (2, 6)), (60, (2, 6, 18, 54))])
def test_rungs_start_at_two_epochs_and_stay_below_the_last(max_epochs: int, expected: tuple[int, ...]) -> None:
    assert rungs(max_epochs) == expected


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_quantile_lies_between_the_extremes(values: list[float]) -> None:
    ordered = sorted(values)
    assert ordered[0] <= quantile(ordered, 2 / 3) <= ordered[-1] + 1e-12
