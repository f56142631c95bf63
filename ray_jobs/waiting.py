"""What a step waits for when the cluster is full, and who holds it: asked of Ray itself, once nothing has moved for a while.

Room is taken by placement groups, and by actors and tasks outside of them. Who took it is known by the words that each of our commands
gives with its connection (`ray_cluster.whoami`), or by its process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from infra.progress import Watcher
from infra.ray_cluster import WHO
from ray_jobs.room import ENOUGH, in_words
from ray_jobs.watch import Watch

QUIET_S = 5.0
"""How long nothing must have moved before Ray is asked."""
SHOWN_EVERY_S = 2.0
LONGEST_PAUSE_S = 40.0
ASK_S = 4
MOST = 1000
COUNTED = ("CPU", "GPU")
log = logging.getLogger(__name__)

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Full:
    """What this command's work asks for in vain, what is free, what it holds itself, and what the others hold by the words for each."""

    wanted: Amounts
    free: Amounts = field(default_factory=dict)
    mine: Amounts = field(default_factory=dict)
    held: Mapping[str, Amounts] = field(default_factory=dict)

    def __str__(self) -> str:
        """Empty where it is only about to start, or waits for work of its own."""
        if all(self.free.get(name, 0.0) >= amount for name, amount in self.wanted.items()):
            return ""
        holders = {who: amounts for who, found in self.held.items() if (amounts := _only(found, self.wanted))}
        if holders:
            held = ", ".join(f"{who} holds {_words(amounts)}" for who, amounts in sorted(holders.items()))
            return f"{_words(self.wanted)} ({held})"
        return "" if _only(self.mine, self.wanted) else f"{_words(self.wanted)} (nobody holds them: a machine that has them is yet to come)"


@contextmanager
def waits_told(watch: Watch) -> Iterator[Watch]:
    """A watch for the work of the body that hears also what the work waits for."""
    moved = _Moved()

    def on_progress(done: float, total: float) -> None:
        moved.to(done)
        watch.on_progress(done, total)

    ended = threading.Event()
    thread = threading.Thread(target=_tell, args=(watch, moved, ended), name="waits", daemon=True)
    thread.start()
    try:
        yield replace(watch, on_progress=Watcher(on_progress))
    finally:
        ended.set()


class _Moved:
    """When the work has last come further."""

    def __init__(self) -> None:
        self.done, self.at = 0.0, time.monotonic()

    def to(self, done: float) -> None:
        if done != self.done:
            self.done, self.at = done, time.monotonic()


def _tell(watch: Watch, moved: _Moved, ended: threading.Event) -> None:
    told, pause_s = "", QUIET_S
    while not ended.wait(SHOWN_EVERY_S if told else pause_s):
        quiet_s = time.monotonic() - moved.at
        what = _looked() if quiet_s >= QUIET_S and not ended.is_set() else ""
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S) if quiet_s >= pause_s else QUIET_S  # a long step is not to keep Ray's dashboard busy
        if (what or told) and not ended.is_set():
            watch.waits(what, quiet_s)
        told = what


def _looked() -> str:
    """A courtesy: where Ray's dashboard does not answer, nothing is said."""
    try:
        return str(look())
    except Exception as error:
        log.debug("Ray does not tell what is waited for: %s", error)
        return ""


def look() -> Full:
    """What the work of this process's connection waits for by now."""
    from ray.util.state import list_actors, list_jobs, list_placement_groups, list_tasks

    asked: dict[str, Any] = {"detail": True, "timeout": ASK_S, "limit": MOST, "raise_on_missing_output": False}
    me = ray.get_runtime_context().get_job_id()
    groups = list_placement_groups(**asked)
    mine_in_line: list[Any] = list_tasks(filters=[("job_id", "=", me), ("state", "=", "PENDING_NODE_ASSIGNMENT")], **asked)
    waiting: list[Any] = [_of_group(one) for one in groups if one.creator_job_id == me and one.state in ("PENDING", "RESCHEDULING")]
    waiting += [one.required_resources for one in mine_in_line]
    wanted = _only(_sum(waiting), dict.fromkeys(COUNTED, 1.0))
    if not wanted:
        return Full(wanted)
    running: list[Any] = list_actors(filters=[("state", "=", "ALIVE")], **asked)
    running += list_tasks(filters=[("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")], **asked)
    held: dict[str, list[Amounts]] = defaultdict(list)
    for group in groups:
        if group.state == "CREATED":
            held[group.creator_job_id].append(_of_group(group))
    for one in running:
        if not one.placement_group_id:
            held[one.job_id].append(one.required_resources or {})
    mine = _sum(held.pop(me, []))
    who = {job.job_id: _who(job) for job in list_jobs(**asked) if job.job_id}
    by_words: dict[str, Amounts] = {}
    for job_id, amounts in held.items():
        words = who.get(job_id, f"job {job_id}")
        by_words[words] = _sum([by_words.get(words, {}), *amounts])
    return Full(wanted, ray.available_resources(), mine, by_words)  # type: ignore[no-untyped-call]


def _of_group(group: Any) -> Amounts:
    return _sum(bundle.get("unit_resources", {}) for bundle in group.bundles or ())


def _who(job: Any) -> str:
    """The words it gave for itself; else the name it was submitted under, or its process."""
    words = (job.metadata or {}).get(WHO)
    driver = job.driver_info
    where = f"process {driver.pid} on {driver.node_ip_address}" if driver else f"job {job.job_id}"
    return str(words or (f"job {job.submission_id}" if job.submission_id else where))


def _sum(all_amounts: Iterable[Amounts | None]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for amounts in all_amounts:
        for name, amount in (amounts or {}).items():
            total[name] += amount
    return dict(total)


def _only(amounts: Amounts, names: Iterable[str]) -> dict[str, float]:
    return {name: amount for name in names if (amount := amounts.get(name, 0.0)) > ENOUGH}


def _words(amounts: Amounts) -> str:
    return " and ".join(in_words(name, round(amount, 2)) for name, amount in amounts.items())
