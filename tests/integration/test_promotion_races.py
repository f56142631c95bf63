"""Sixteen pipelines promote at once: each is judged against whoever really serves, and the alias ends where the ledger does."""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from infra import registry
from infra.ledger import champion_of, verify
from infra.object_store import object_store
from infra.tracking import client
from ray_jobs.spec import Spec
from tasks.ledger_book import follow, open_book
from tests import postgresql
from tests import promotion_worlds as worlds
from tests.promotion_racers import CONTEXT, race

pytestmark = pytest.mark.slow
RACERS, KILLS = 16, 4
ROUNDS = int(os.environ.get("UNFREEZE_RACE_ROUNDS", "2"))
"""Twenty take many minutes, and were run on every kind: see docs/LOG.md."""
KILL_WITHIN_S = 2.0


@dataclass
class Racer:
    """One pipeline as its parent sees it."""

    pipe: Connection
    process: BaseProcess
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@pytest.mark.parametrize("kind", ["s3", "sqlite", "postgresql"])
def test_whoever_promotes_has_beaten_whoever_served_and_the_alias_follows_though_four_are_killed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, mlflow_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = request.getfixturevalue("enforcing_s3" if kind == "s3" else "s3")
    databases = {"s3": None, "sqlite": f"sqlite:///{tmp_path / 'ledger.db'}"}
    database = databases[kind] if kind in databases else postgresql.new_database(request.getfixturevalue("postgresql_server"))
    variables = dict(s3) | worlds.environment(mlflow_url, tmp_path / "home", database)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client.cache_clear()
    spec = worlds.spec_of(f"race-{kind}", f"s3://unfreeze/{secrets.token_hex(6)}")
    chance = random.Random(kind)
    with _racers(spec, variables) as racers:
        for number in range(ROUNDS):
            _round(racers, number)
        assert len(racers) == RACERS
        for number in range(ROUNDS, ROUNDS + KILLS):
            _round(racers, number, victim=chance.choice(racers), after_s=chance.uniform(0, KILL_WITHIN_S))
        assert len(racers) == RACERS - KILLS
        _check(spec, racers)


@contextmanager
def _racers(spec: Spec, variables: dict[str, str]) -> Iterator[list[Racer]]:
    racers = []
    for number in range(RACERS):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=race, args=(spec, number, theirs, variables))
        process.start()
        theirs.close()
        racers.append(Racer(ours, process))
    everyone = list(racers)
    try:
        for racer in racers:
            racer.pipe.recv()
        yield racers
    finally:
        for racer in everyone:
            racer.process.kill()
            racer.process.join()
            racer.pipe.close()


def _round(racers: list[Racer], number: int, victim: Racer | None = None, after_s: float = 0.0) -> None:
    """All promote one version each, at once; the victim is killed at some moment of it."""
    for racer in racers:
        racer.pipe.send(number)
    if victim is not None:
        time.sleep(after_s)
        assert victim.process.pid
        os.kill(victim.process.pid, signal.SIGKILL)
    busy = {racer.pipe: racer for racer in racers}
    while busy:
        for pipe in connection.wait(list(busy)):
            racer = busy.pop(pipe)  # type: ignore[call-overload]
            try:
                racer.told.append(racer.pipe.recv())
            except (EOFError, ConnectionResetError):  # killed, perhaps with our message unread
                racers.remove(racer)
    if victim is not None and victim in racers:  # it had answered before the kill
        racers.remove(victim)


def _check(spec: Spec, racers: list[Racer]) -> None:
    book = open_book(spec.name)
    kept = book.ledger.kept(spec.name)
    assert verify(kept.entries, kept.copies) == []
    entries = book.entries
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert len({entry.to_version for entry in entries}) == len(entries)  # each version judged once
    for racer in racers:
        for version, told in racer.told:
            entry = entries[told["number"] - 1]
            assert (entry.to_version, entry.digest) == (version, told["digest"])
    for number, entry in enumerate(entries):
        served = champion_of(entries[:number])
        assert entry.from_version == served
        asked = {"request": "again", "by": "test", "reason": ""}
        again = worlds.verdict_on(spec, entry.to_version, served, asked)
        assert entry.verdict == again["judgement"]["status"]
        if entry.verdict == "promoted" and served is not None:
            gain = next(rule for rule in again["judgement"]["rules"] if rule["name"] == "gain")
            assert gain["figures"][0]["low"] > 0
    serving, _ = follow(book)  # the next command puts right what a killed one has left
    named = registry.champion(spec.name)
    assert named is not None
    assert named.version == serving == champion_of(entries)
    assert object_store().exists(entries[-1].evidence_uri + "/MANIFEST.json")
