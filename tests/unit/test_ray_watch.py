"""A head that is gone is noticed, a silent or living one is not; and a command that cannot leave is ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM, signal
from types import FrameType

import pytest

from infra import ray_watch
from infra.errors import ServiceError

STUCK = """
import signal, sys, threading, time
from infra import ray_watch
signal.signal(signal.SIGINT, signal.default_int_handler)
ray_watch.LOOK_EVERY_S, ray_watch.GONE_AFTER_S, ray_watch.LEAVE_S = 0.05, 0.1, 0.5
with ray_watch.watched(sys.argv[1]):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
"""


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(ray_watch, "GONE_AFTER_S", 0.2)


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture(params=[{SIGINT: interrupt, SIGTERM: SIG_DFL}, {SIGINT: SIG_IGN, SIGTERM: interrupt}], ids=["INT", "TERM"])
def handlers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A command's, in the foreground; and where a script has started it in the background."""
    before = {number: signal(number, handler) for number, handler in request.param.items()}
    yield
    for number, handler in before.items():
        signal(number, handler)


@pytest.mark.usefixtures("soon", "handlers")
def test_the_body_is_interrupted_when_the_head_goes(head: socket.socket) -> None:
    threading.Timer(0.5, head.close).start()
    with pytest.raises(ServiceError, match=address_of(head)), ray_watch.watched(address_of(head)):
        time.sleep(20)


@pytest.mark.usefixtures("soon")
def test_a_head_that_lives_and_an_address_without_a_port_disturb_nobody(head: socket.socket) -> None:
    for address in (address_of(head), "auto", ""):
        with ray_watch.watched(address):
            time.sleep(0.5)


@pytest.mark.usefixtures("soon")
def test_ctrl_c_stays_ctrl_c(head: socket.socket) -> None:
    with pytest.raises(KeyboardInterrupt), ray_watch.watched(address_of(head)):
        raise KeyboardInterrupt


def test_who_cannot_leave_is_ended_with_exit_code_3_and_a_word(head: socket.socket) -> None:
    address = address_of(head)
    head.close()
    done = subprocess.run([sys.executable, "-c", STUCK, address], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, "interrupted\n")
    assert address in done.stderr
