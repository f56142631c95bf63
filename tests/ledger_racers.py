"""Processes that promote different versions of one model at once, round after round, until they are told to end or are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from infra.errors import LedgerConflict
from infra.ledger import Content, Entry, Ledger
from tests.ledger_worlds import World, content

CONTEXT = get_context("forkserver")  # a clean process that has loaded boto3 and SQLAlchemy once, and forks the others
CONTEXT.set_forkserver_preload(["tests.ledger_racers", "boto3", "psycopg"])
JUDGEMENT_S = 0.2
"""Who came second takes at most that long before it tries again."""
STRIDE = 4


@dataclass(frozen=True)
class Acknowledged:
    """What one racer was told that it has committed."""

    racer: int
    entry: Entry


@dataclass
class Racer:
    """One process as its parent sees it."""

    number: int
    pipe: Connection
    process: BaseProcess
    busy: bool = False


@dataclass
class Race:
    """Some racers, and all that was acknowledged to them."""

    racers: list[Racer]
    acknowledged: list[Acknowledged] = field(default_factory=list)

    def start(self, model: str) -> None:
        """All racers promote one version each, at once, knowing of the entries that were acknowledged."""
        for racer in list(self.racers):
            try:
                racer.pipe.send((model, len(self.acknowledged)))
                racer.busy = True
            except BrokenPipeError:  # killed after its last promotion had been acknowledged
                self.racers.remove(racer)

    def finish(self) -> None:
        """Wait for everybody who has not been killed."""
        while busy := {racer.pipe: racer for racer in self.racers if racer.busy}:
            for pipe in connection.wait(list(busy)):
                racer = busy[pipe]  # type: ignore[index]
                try:
                    self.acknowledged.append(Acknowledged(racer.number, racer.pipe.recv()))
                    racer.busy = False
                except (EOFError, ConnectionResetError):  # killed, perhaps with our message unread
                    racer.pipe.close()
                    self.racers.remove(racer)

    def kill_one(self, chance: random.Random, within_s: float) -> None:
        """Kill -9 a racer at some moment."""
        time.sleep(chance.uniform(0, within_s))
        victim = chance.choice(self.racers)
        assert victim.process.pid
        os.kill(victim.process.pid, signal.SIGKILL)


@contextmanager
def racing(world: World, count: int, environment: Mapping[str, str]) -> Iterator[Race]:
    """`count` processes that have opened the ledger and wait."""
    racers = []
    for number in range(count):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_race, args=(world, number, theirs, dict(environment)))
        process.start()
        theirs.close()
        racers.append(Racer(number, ours, process))
    everyone = list(racers)
    try:
        for racer in racers:
            racer.pipe.recv()
        yield Race(racers)
    finally:
        for racer in everyone:
            racer.process.kill()
            racer.process.join()
            racer.pipe.close()


def _race(world: World, racer: int, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    ledger, chance, version = world.open(), random.Random(racer), 0
    ledger.entries("warm-up")
    pipe.send("ready")
    while True:
        (model, last), version = pipe.recv(), version + 1
        said, number = content(f"{racer}.{version}", by=f"racer {racer}"), last + 1
        while (entry := _promote(ledger, model, said, number)) is None:
            time.sleep(chance.uniform(0, JUDGEMENT_S))
            number = _following(world, model, number)
        pipe.send(entry)


def _promote(ledger: Ledger, model: str, said: Content, number: int) -> Entry | None:
    try:
        return ledger.append(model, said, number)
    except LedgerConflict:
        return None


def _following(world: World, model: str, number: int) -> int:
    """A number after this one that may be free, without reading a whole chain for it."""
    while world.store.exists(world.uri(number + STRIDE, model)):
        number += STRIDE
    return number + 1
