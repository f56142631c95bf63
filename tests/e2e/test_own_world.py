"""The world that the cluster's hosts live in: it leaves nothing behind, however it ends, and says so where it cannot be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import own_world

ROOT = Path(__file__).parents[2]
ENTER = [sys.executable, "-m", "tests.e2e.own_world"]
needs_world = pytest.mark.skipif(own_world.inside() or own_world.why_not() is not None, reason="no world can be made here")


@needs_world
def test_its_network_is_its_own_and_its_commands_exit_code_is_told() -> None:
    script = f"ip addr show dev {own_world.BRIDGE} && exit 7"
    inside = subprocess.run([*ENTER, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (inside.returncode, own_world.HERE in inside.stdout) == (7, True)
    outside = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True)
    assert f"{own_world.BRIDGE}:" not in outside.stdout


@needs_world
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_was_started_in_it_ends_with_it(number: signal.Signals) -> None:
    """Also what has left its parents and its session."""
    nap = f"{900 + os.getpid() / 10**7:.7f}"
    world = subprocess.Popen([*ENTER, "sh", "-c", f"setsid sleep {nap} & sleep {nap}"], cwd=ROOT, start_new_session=True)
    try:
        _until(lambda: _running(nap) == 2)
    finally:
        os.killpg(world.pid, number)  # as a terminal does, and `timeout`
    world.wait()
    _until(lambda: _running(nap) == 0)


def test_where_it_cannot_be_made_the_command_is_skipped_in_words() -> None:
    done = subprocess.run([*ENTER, "false"], cwd=ROOT, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Skipped: no hosts can be made on this machine: unshare, nsenter, ip, mount not found" in done.stdout


def _running(nap: str) -> int:
    found = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True)
    return found.stdout.splitlines().count(f"sleep {nap}")


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")
