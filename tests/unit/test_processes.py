"""Recorded processes: found again, ended with all they started, and never mistaken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.processes import ProcessRecord

PARENT_OF_ONE = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.communicate()


def _start(started: list[subprocess.Popen[str]], code: str) -> tuple[ProcessRecord, str]:
    """A recorded leader of its own session, and its first line."""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    started.append(child)
    assert child.stdout is not None
    return processes.record(child.pid, "leader"), child.stdout.readline().strip()


def test_a_process_is_alive_until_it_ends_even_before_it_is_reaped(started: list[subprocess.Popen[str]]) -> None:
    leader, _ = _start(started, PARENT_OF_ONE)
    assert processes.is_alive(leader)
    processes.end([leader], grace_s=5)
    assert not processes.is_alive(leader)


def test_another_process_under_the_same_id_is_neither_alive_nor_ended(started: list[subprocess.Popen[str]]) -> None:
    leader, child = _start(started, PARENT_OF_ONE)
    earlier = replace(leader, create_time=leader.create_time - 60)
    assert not processes.is_alive(earlier)
    processes.end([earlier], grace_s=0)
    assert processes.is_alive(leader)
    assert psutil.pid_exists(int(child))
    processes.end([leader], grace_s=5)


def test_ending_a_process_ends_what_it_started(started: list[subprocess.Popen[str]]) -> None:
    leader, child = _start(started, PARENT_OF_ONE)
    assert int(child) in {member.pid for member in processes.family([leader])}
    processes.end([leader], grace_s=5)
    assert not _runs(int(child))


def test_an_orphan_is_found_after_the_death_of_its_parent(started: list[subprocess.Popen[str]]) -> None:
    leader, child = _start(started, PARENT_OF_ONE)
    os.kill(leader.pid, signal.SIGKILL)
    started[0].wait()
    assert _runs(int(child))
    assert [member.pid for member in processes.family([leader])] == [int(child)]
    processes.end([leader], grace_s=5)
    assert not _runs(int(child))


def test_a_process_deaf_to_term_is_killed_after_its_grace(started: list[subprocess.Popen[str]]) -> None:
    leader, _ = _start(started, DEAF)
    began = time.monotonic()
    processes.end([leader], grace_s=0.3)
    assert not processes.is_alive(leader)
    assert time.monotonic() - began >= 0.3


def test_a_process_may_tidy_up_within_its_grace(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    note = tmp_path / "tidied"
    tidy = f"import signal, sys, time\nsignal.signal(15, lambda *_: (open({str(note)!r}, 'w').close(), sys.exit()))\n"
    leader, _ = _start(started, tidy + "print(flush=True); time.sleep(60)")
    processes.end([leader], grace_s=10)
    assert note.exists()


def test_ending_nothing_or_what_has_gone_is_harmless(started: list[subprocess.Popen[str]]) -> None:
    leader, _ = _start(started, PARENT_OF_ONE)
    processes.end([leader], grace_s=5)
    processes.end([leader], grace_s=5)
    processes.end([], grace_s=5)


def test_this_process_is_never_among_those_to_end() -> None:
    assert os.getpid() not in {member.pid for member in processes.family([processes.record_self("test")])}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_ends_while_it_is_asked_for_its_name_has_none(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, _ = _start(started, PARENT_OF_ONE)
    assert processes.named([leader], [psutil.Process(leader.pid).name()]) == [leader]

    def ended(self: psutil.Process) -> str:
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "name", ended)
    assert processes.named([leader], ["python"]) == []
