"""What a step waits for, in words, and when it is told."""

from __future__ import annotations

import threading

import pytest

from ray_jobs import waiting
from ray_jobs.waiting import Full, waits_told
from ray_jobs.watch import Watch

ALICE = {"retrain pets of alice": {"CPU": 2.0}}


@pytest.mark.parametrize(
    ("full", "words"),
    [
        (Full({"CPU": 2.0}, held=ALICE), "2 CPUs (retrain pets of alice holds 2 CPUs)"),
        (Full({"CPU": 1.0, "GPU": 0.25}, held=ALICE), "1 CPU and 0.25 GPUs (retrain pets of alice holds 2 CPUs)"),
        (Full({"GPU": 1.0}, held=ALICE), "1 GPU (nobody holds them: a machine that has them is yet to come)"),
        (Full({"CPU": 1.0}, mine={"CPU": 2.0}), ""),  # its own work is in the way
        (Full({"CPU": 1.0}, free={"CPU": 4.0}, held=ALICE), ""),  # about to start
        (Full({}), ""),
    ],
)
def test_a_wait_names_what_is_missing_and_who_holds_it(full: Full, words: str) -> None:
    assert str(full) == words


def test_a_wait_is_told_once_nothing_moves_and_taken_back_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "QUIET_S", 0.05)
    monkeypatch.setattr(waiting, "SHOWN_EVERY_S", 0.05)
    monkeypatch.setattr(waiting, "look", lambda: Full({"CPU": 2.0}, held=ALICE))
    told: list[str] = []
    waits, goes_on = threading.Event(), threading.Event()

    def heard(what: str, seconds: float) -> None:
        told.append(what)
        (waits if what else goes_on).set()

    with waits_told(Watch(waits=heard)) as watch:
        assert waits.wait(30)
        monkeypatch.setattr(waiting, "QUIET_S", 3600.0)
        watch.on_progress(1, 2)
        assert goes_on.wait(30)
    assert told[0] == "2 CPUs (retrain pets of alice holds 2 CPUs)"
    assert told[-1] == ""


def test_a_ray_that_does_not_tell_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Full:
        raise RuntimeError("no dashboard")

    monkeypatch.setattr(waiting, "look", fails)
    assert waiting._looked() == ""
