"""The pure parts of the benchmarks: goals, what counts as the same outcome, and trial-epochs to an accuracy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SHARED = ("bench", "chaos_checks", "chaos_site")
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a benchmark by its name, as it sees the others when it runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_importing_a_benchmark_runs_nothing(load: Load, name: str) -> None:
    module = load(name)
    assert not hasattr(module, "main") if name in SHARED else module.main


def test_a_goal_is_met_on_its_good_side_alone(load: Load) -> None:
    figure = load("bench").Figure
    assert [figure("x", value, "x", 10.0).met for value in (9.9, 10.0)] == [False, True]
    assert [figure("x", value, "x", 1.05, higher=False).met for value in (1.05, 1.06)] == [True, False]
    assert figure("x", 3.0).met is None


def test_a_round_runs_every_arm_and_the_next_one_in_the_other_order(load: Load) -> None:
    order: list[str] = []
    arms = {name: lambda n=name: (order.append(n), float(len(order)))[1] for name in ("a", "b")}
    assert load("bench").in_turns(arms, 2) == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert order == ["a", "b", "b", "a"]


def test_epochs_count_in_the_order_in_which_they_ended(load: Load) -> None:
    def trial(started_at: int, *accuracies: float) -> dict[str, Any]:
        return {"started_at": started_at, "curve": [{"seconds": 1.0, "val_accuracy": value} for value in accuracies]}

    trials = [trial(10_000, 0.9), trial(0, 0.5, 0.6, 0.8)]
    epochs_to = load("warm_start").epochs_to
    assert epochs_to(trials, 0.6) == (2, True)
    assert epochs_to(trials, 0.85) == (4, True)
    assert epochs_to(trials, 0.95) == (4, False)
