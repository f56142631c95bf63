"""Sixteen processes promote at once, on every kind of ledger: nothing is lost, doubled or half-written, whoever is killed."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from infra.ledger import verify
from tests.ledger_racers import Race, racing
from tests.ledger_worlds import World, make_world

pytestmark = pytest.mark.slow
RACERS = 16
ROUNDS = int(os.environ.get("UNFREEZE_RACE_ROUNDS", "4"))
"""Twenty take minutes, and were run on every kind: see docs/LOG.md."""
KILLS = 4
KILL_WITHIN_S = 0.3
"""About what a round takes on a quiet machine."""


@pytest.fixture(params=["s3", "sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return make_world(request.param, request, tmp_path)


def test_sixteen_processes_at_once_leave_one_chain_and_so_they_do_when_four_of_them_are_killed(
    world: World, request: pytest.FixtureRequest
) -> None:
    environment = request.getfixturevalue("enforcing_s3" if world.kind == "s3" else "s3")
    chance = random.Random(world.kind)
    with racing(world, RACERS, environment) as race:
        for _ in range(ROUNDS):
            race.start("undisturbed")
            race.finish()
        _check(world, race, "undisturbed", ROUNDS)
        assert len(race.acknowledged) == ROUNDS * RACERS
        race.acknowledged.clear()
        for _ in range(KILLS):
            race.start("killed")
            race.kill_one(chance, KILL_WITHIN_S)
            world.open().entries("killed")  # whatever can be seen at that moment verifies
            race.finish()
        race.start("killed")
        race.finish()
    assert len(race.racers) == RACERS - KILLS
    _check(world, race, "killed", KILLS + 1)


def _check(world: World, race: Race, model: str, rounds: int) -> None:
    """What was acknowledged is there; what nobody was told of is at most the last word of somebody who was killed."""
    entries = world.open().entries(model)
    kept = world.open().kept(model)
    assert verify(kept.entries, kept.copies) == []
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert len({entry.to_version for entry in entries}) == len(entries)
    for told in race.acknowledged:
        assert entries[told.entry.number - 1] == told.entry
    acknowledged = {told.entry.number for told in race.acknowledged}
    assert len(acknowledged) == len(race.acknowledged)
    living = {f"racer {racer.number}" for racer in race.racers}
    unacknowledged = [entry.by for entry in entries if entry.number not in acknowledged]
    assert not living & set(unacknowledged)
    assert len(set(unacknowledged)) == len(unacknowledged)
    assert all(times == rounds for by, times in Counter(entry.by for entry in entries).items() if by in living)
