"""Who counts as dead: by the process table on this machine, elsewhere by a heartbeat that stands still while somebody looks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun

from infra import processes
from infra.lease import Holder, this_machine
from tasks.reaper import BEAT_S, PATIENCE_S, Watch, holder_of, labels_of

FAR = Holder(str(uuid4()), "another machine", "far.example", 7, 1.5)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def looks(gaps_s: list[float], beats: list[int]) -> list[bool]:
    """What each look concludes, `gaps_s` seconds after the one before."""
    clock, concluded = Clock(), []
    watch = Watch(clock=clock)
    for gap_s, beat in zip(gaps_s, beats, strict=True):
        clock.now += gap_s
        concluded.append(watch.is_dead(replace(FAR, beat=beat)))
    return concluded


def test_a_heartbeat_that_stands_still_for_the_patience_is_that_of_a_dead_process() -> None:
    count = int(PATIENCE_S / BEAT_S) + 2
    assert looks([BEAT_S] * count, [3] * count) == [False] * (count - 1) + [True]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_who_shows_a_new_beat_at_every_look_lives_however_long_the_gaps(gaps_s: list[float]) -> None:
    assert not any(looks(gaps_s, list(range(len(gaps_s)))))


@given(st.floats(0, 1e9), st.integers(1, 3))
def test_who_has_not_looked_for_long_has_seen_nothing(gap_s: float, count: int) -> None:
    """After a sleep, or after Prefect was away for both, the other has the time to beat again."""
    assert not any(looks([BEAT_S, *([gap_s] * count)], [3] * (count + 1)))


def test_a_killed_process_of_this_machine_is_dead_at_the_first_look_and_a_living_one_never() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    known = processes.record(child.pid, "child")
    here = Holder(str(uuid4()), this_machine(), "here", child.pid, known.create_time)
    clock = Clock()
    watch = Watch(clock=clock)
    for _ in range(20):
        clock.now += BEAT_S
        assert not watch.is_dead(here)
    child.kill()
    child.wait()
    assert watch.is_dead(here)


def test_the_heartbeat_is_read_as_it_was_written_and_an_earlier_attempts_is_none() -> None:
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), run_count=2, labels=labels_of(FAR, attempt=2, beat=9))
    assert holder_of(flow_run) == replace(FAR, token=str(flow_run.id), beat=9)
    for labels in ({}, labels_of(FAR, attempt=1, beat=9), labels_of(FAR, 2, 9) | {"unfreeze.pid": "seven"}):
        assert holder_of(flow_run.model_copy(update={"labels": labels})) is None
