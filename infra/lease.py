"""A lease on the object store: one process at a time does a piece of work, on whichever machine; the others wait and find it done.

The store may not enforce conditional writes, so two processes can, rarely, hold the same lease: that must only cost double work. A
lease is an object that says who holds it, renewed by a thread. A waiter on the same machine asks the process table whether the
holder lives; elsewhere the holder counts as dead when the object has not changed for a while on the waiter's own clock.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from infra import patience, processes
from infra.errors import ServiceError
from infra.object_store import ObjectStore
from infra.processes import ProcessRecord
from infra.settings import user

RENEW_S = 5.0
PATIENCE_S = 30.0
POLL_S = 0.5
SETTLE_S = 0.1
"""Between writing a lease and reading it again: who wrote at the same moment has then written too, and the last one has it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; `beat` rises with each renewal."""

    token: str
    machine: str
    host: str
    pid: int
    create_time: float
    beat: int = 0
    user: str = ""

    @property
    def is_dead(self) -> bool:
        """Known only of processes of this machine."""
        return self.machine == this_machine() and not processes.is_alive(ProcessRecord(self.pid, self.create_time, "lease"))

    def __str__(self) -> str:
        whose = f" of {self.user}" if self.user else ""
        return f"process {self.pid}{whose}" + ("" if self.machine == this_machine() else f" on {self.host}")


@dataclass(frozen=True)
class Waiting:
    """How a lease is waited for, in seconds."""

    renew_s: float = RENEW_S
    patience_s: float = PATIENCE_S
    poll_s: float = POLL_S
    settle_s: float = SETTLE_S


def this_machine() -> str:
    """What tells process tables apart: the boot of a kernel, and the namespace of ids within it (containers share a kernel)."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@contextmanager
def hold(store: ObjectStore, uri: str, on_wait: Callable[[Holder], None], waiting: Waiting | None = None) -> Iterator[None]:
    """Hold the lease at `uri` for the body. `on_wait` is called once for each holder that is waited for."""
    waiting = waiting or Waiting()
    me = processes.record_self("lease")
    mine = Holder(secrets.token_hex(8), this_machine(), socket.gethostname(), me.pid, me.create_time, user=user())
    while True:
        _wait(store, uri, on_wait, waiting)
        _write(store, uri, mine)
        time.sleep(waiting.settle_s)
        if _is_ours(store, uri, mine):
            break
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, uri, mine, done, waiting.renew_s), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        with suppress(ServiceError), patience.at_most(waiting.renew_s):  # it would then run out by itself
            if _is_ours(store, uri, mine):
                store.delete([uri])


def _wait(store: ObjectStore, uri: str, on_wait: Callable[[Holder], None], waiting: Waiting) -> None:
    """Return when nobody alive holds the lease."""
    last, since, told = None, time.monotonic(), ""
    while True:
        asked_at = time.monotonic()
        holder = _read(store, uri)
        since += time.monotonic() - asked_at  # while the store does not answer, the holder cannot renew either
        if holder is None or holder.is_dead:
            return
        if holder != last:
            last, since = holder, time.monotonic()
        elif time.monotonic() - since > waiting.patience_s:
            return
        if holder.token != told:
            told = holder.token
            on_wait(holder)
        time.sleep(waiting.poll_s)


def _renew(store: ObjectStore, uri: str, mine: Holder, done: threading.Event, renew_s: float) -> None:
    beat = 0
    while not done.wait(renew_s):
        beat += 1
        with suppress(ServiceError), patience.at_most(renew_s):  # tried again at the next beat
            if not _is_ours(store, uri, mine):
                return  # taken over while this process was stopped: the work goes on, twice
            _write(store, uri, Holder(**{**asdict(mine), "beat": beat}))


def _is_ours(store: ObjectStore, uri: str, mine: Holder) -> bool:
    holder = _read(store, uri)
    return holder is not None and holder.token == mine.token


def _write(store: ObjectStore, uri: str, holder: Holder) -> None:
    store.write(uri, json.dumps(asdict(holder)).encode())


def _read(store: ObjectStore, uri: str) -> Holder | None:
    """Who holds the lease; None where nobody does, or what is there cannot be read."""
    try:
        return Holder(**json.loads(store.read(uri)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
