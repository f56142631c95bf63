"""Processes remembered across commands: recorded by id and start time, so that a reused id is never taken for the old process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

SAME_START_S = 2.0
"""Start times are counted from a boot time that the kernel rounds to whole seconds; an id comes round again much later than this."""
POLL_S = 0.05


@dataclass(frozen=True)
class ProcessRecord:
    """One process as it was when recorded."""

    pid: int
    create_time: float
    what: str


def record(pid: int, what: str) -> ProcessRecord:
    """Record a living process. Raises psutil.NoSuchProcess where there is none."""
    return ProcessRecord(pid, psutil.Process(pid).create_time(), what)


def record_self(what: str) -> ProcessRecord:
    """Record this process."""
    return record(os.getpid(), what)


def is_alive(known: ProcessRecord) -> bool:
    """Whether this very process still runs (a zombie does not)."""
    return _living(known) is not None


def family(known: Iterable[ProcessRecord]) -> list[ProcessRecord]:
    """The living among `known`, their descendants, and what descendants of the dead are left in the sessions they led."""
    return [ProcessRecord(member.pid, member.create_time(), what) for member, what in _family(list(known)).items() if member.is_running()]


def named(known: Iterable[ProcessRecord], names: Collection[str]) -> list[ProcessRecord]:
    """Those of `known` that live and whose program has one of these names."""
    return [one for one in known if _name(one) in names]


def end(known: Iterable[ProcessRecord], grace_s: float) -> None:
    """TERM, then after `grace_s` KILL, to the whole family of `known`; returns when none of it runs."""
    end_by_grace({grace_s: list(known)})


def end_by_grace(known_by_grace_s: Mapping[float, list[ProcessRecord]]) -> None:
    """End several families side by side, each with its own time between TERM and KILL."""
    started = time.monotonic()
    for known in known_by_grace_s.values():
        _send(_family(known), signal.SIGTERM)
    left = {grace_s: known for grace_s, known in known_by_grace_s.items() if _family(known)}
    while left:
        for grace_s, known in left.items():
            if time.monotonic() - started >= grace_s:  # again and again: a process may fork while its family is being ended
                _send(_family(known), signal.SIGKILL)
        time.sleep(POLL_S)
        left = {grace_s: known for grace_s, known in left.items() if _family(known)}


def _name(known: ProcessRecord) -> str | None:
    """The name of its program; None where it does not live (it may end while it is asked)."""
    try:
        process = _living(known)
        return None if process is None else str(process.name())
    except psutil.NoSuchProcess:
        return None


def _living(known: ProcessRecord) -> psutil.Process | None:
    try:
        process = psutil.Process(known.pid)
        same = abs(process.create_time() - known.create_time) < SAME_START_S
        return process if same and not _is_gone(process) else None
    except psutil.NoSuchProcess:
        return None


def _is_gone(process: psutil.Process) -> bool:
    """Reap it where it is our own child, and say whether it has ended."""
    with suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _family(known: list[ProcessRecord]) -> dict[psutil.Process, str]:
    members: dict[psutil.Process, str] = {}
    for one in known:
        if (process := _living(one)) is not None:
            members[process] = one.what
            members.update(dict.fromkeys(_children(process), one.what))
    for process, what in _in_sessions_of(known).items():
        members.setdefault(process, what)
    return {process: what for process, what in members.items() if process.pid != os.getpid()}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children(recursive=True) if not _is_gone(child)]
    except psutil.NoSuchProcess:
        return []


def _in_sessions_of(known: list[ProcessRecord]) -> dict[psutil.Process, str]:
    """Members of the sessions that `known` led. An orphan has no parent to be found by, but it keeps its session.

    The kernel does not give an id away while a session bears it, so a session is not ours only where its leader's id now belongs to
    another process, or where its member is older than the leader.
    """
    leaders = {one.pid: one for one in known if one.pid != os.getsid(0) and (not psutil.pid_exists(one.pid) or is_alive(one))}
    found: dict[psutil.Process, str] = {}
    for pid in psutil.pids() if leaders else []:
        try:
            leader = leaders.get(os.getsid(pid))
            if leader is None:
                continue
            process = psutil.Process(pid)
            if process.create_time() > leader.create_time - SAME_START_S and not _is_gone(process):
                found[process] = leader.what
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    return found


def _send(members: Iterable[psutil.Process], number: signal.Signals) -> None:
    for member in members:
        try:
            member.send_signal(number)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
